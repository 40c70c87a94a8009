"""Pure: the words of placement: hardware to place on, workers, candidates, and what a candidate reached."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


class Mode(Enum):
    """How prompts and tokens share devices."""

    DISAGGREGATED = "disaggregated"
    COLOCATED = "colocated"


class Objective(Enum):
    """A part of the SLO; the one that fails first binds a candidate."""

    TTFT = "time to first token"
    TPOT = "time per token"
    GAP = "longest gap"


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Equal nodes with one kind of device; `price_per_hour` is that of a device, in any currency."""

    device: str
    nodes: int
    devices_per_node: int
    price_per_hour: float = 1.0

    @property
    def devices(self) -> int:
        """Devices of the group."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True, slots=True)
class WorkerKind:
    """A worker spread over tp * pp devices of one group; a tensor-parallel stage never leaves its node."""

    device: str
    tp: int = 1
    pp: int = 1

    @property
    def devices(self) -> int:
        """Devices of one worker."""
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"{self.device} tp{self.tp} pp{self.pp}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """The unit that is replicated: so many prefill workers and decode workers, or colocated ones alone.

    A colocated candidate has no decode workers; `prefill` are its workers. `same_node`: KV never leaves a
    node.
    """

    mode: Mode
    prefill: WorkerKind
    prefill_workers: int
    decode: WorkerKind | None = None
    decode_workers: int = 0
    same_node: bool = True

    @property
    def devices(self) -> Mapping[str, int]:
        """Devices it needs, by device name."""
        needed: Counter[str] = Counter({self.prefill.device: self.prefill_workers * self.prefill.devices})
        if self.decode is not None:
            needed[self.decode.device] += self.decode_workers * self.decode.devices
        return needed

    @property
    def signature(self) -> tuple[str, ...]:
        """Which devices serve which role; candidates with equal ones compete with each other."""
        decode = () if self.decode is None else (self.decode.device,)
        return (self.mode.value, self.prefill.device, *decode)

    def pieces(self, devices_per_node: Mapping[str, int]) -> Mapping[tuple[str, int], int]:
        """What must fit into nodes: how many pieces by (device, size).

        Workers that share a node are one piece a pipeline stage (DistServe's Algorithm 2), or one altogether
        where that fits; else every stage of every worker is a piece of its own (Algorithm 1).
        """
        if self.decode is None or not self.same_node:
            apart: Counter[tuple[str, int]] = Counter()
            apart[self.prefill.device, self.prefill.tp] += self.prefill_workers * self.prefill.pp
            if self.decode is not None:
                apart[self.decode.device, self.decode.tp] += self.decode_workers * self.decode.pp
            return apart
        stages = self.prefill.pp if self.prefill.pp == self.decode.pp else 1
        together = sum(self.devices.values())
        if together <= devices_per_node[self.prefill.device]:
            stages = 1
        return {(self.prefill.device, together // stages): stages}

    def __str__(self) -> str:
        if self.decode is None:
            return f"{self.prefill_workers} x colocated ({self.prefill})"
        where = "one node" if self.same_node else "any nodes"
        return (
            f"{self.prefill_workers} x prefill ({self.prefill}) + {self.decode_workers} x decode "
            f"({self.decode}), {where}"
        )


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives in seconds, and the share of all requests that must meet all of them."""

    ttft_s: float
    tpot_s: float
    longest_gap_s: float
    attainment: float


@dataclass(frozen=True, slots=True)
class Reached:
    """How many requests of a run were offered, met each objective, and met them all."""

    offered: int
    good: int
    met: Mapping[Objective, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of requests that met all objectives."""
        return self.good / self.offered if self.offered else 0.0

    @property
    def binding(self) -> Objective:
        """The objective that most requests missed."""
        return min(Objective, key=lambda objective: self.met.get(objective, self.offered))


class Evaluate(Protocol):
    """Runs a candidate under load; a simulation, or in tests a formula."""

    def __call__(
        self, candidate: Candidate, rate_rps: float, bucket: int = 0, slo_scale: float = 1.0
    ) -> Reached:
        """What is reached at a rate of requests of one bucket of lengths, with all objectives times
        `slo_scale`."""
        ...
