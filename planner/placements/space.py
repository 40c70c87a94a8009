"""Pure: which candidates there are on given nodes: every tp, pp and P:D ratio that fits, and why others do
not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Protocol

from planner.latency import LatencyModel, TransferModel
from planner.placements.placement import Candidate, Mode, NodeGroup, WorkerKind


class Affinity(Enum):
    """Where KV may go (DistServe): HIGH anywhere, LOW only inside a node, AUTO inside where a pair fits."""

    HIGH = "high"
    LOW = "low"
    AUTO = "auto"


class Workers(Protocol):
    """What is known of a kind of worker with the model and workload at hand; all calls pure."""

    def latency(self, kind: WorkerKind) -> LatencyModel | None:
        """Its step times; None when there are no figures for it or the model cannot be cut that way."""
        ...

    def kv_tokens(self, kind: WorkerKind) -> int:
        """Tokens of KV that fit beside the weights; 0 or less when the weights do not fit."""
        ...

    def transfer(self) -> TransferModel:
        """How long KV takes to move."""
        ...


@dataclass(frozen=True, slots=True)
class Space:
    """The fleet and the limits of what is tried on it."""

    groups: tuple[NodeGroup, ...]
    tp: tuple[int, ...] = (1, 2, 4, 8)
    pp: tuple[int, ...] = (1, 2, 4)
    most_workers: int = 4
    affinity: Affinity = Affinity.AUTO
    modes: tuple[Mode, ...] = (Mode.DISAGGREGATED, Mode.COLOCATED)

    def group(self, device: str) -> NodeGroup:
        """The group with a device; each device has one group."""
        return next(group for group in self.groups if group.device == device)

    @property
    def devices_per_node(self) -> Mapping[str, int]:
        """By device name."""
        return {group.device: group.devices_per_node for group in self.groups}

    def cost(self, candidate: Candidate) -> float:
        """Price of its devices for an hour."""
        return sum(self.group(name).price_per_hour * count for name, count in candidate.devices.items())


def worker_kinds(space: Space, workers: Workers, longest_tokens: int) -> list[WorkerKind]:
    """Kinds with figures whose memory holds weights and the KV of the longest request."""
    return [
        kind
        for group in space.groups
        for kind in all_kinds(space, group)
        if workers.latency(kind) is not None and workers.kv_tokens(kind) >= longest_tokens
    ]


def all_kinds(space: Space, group: NodeGroup) -> Iterator[WorkerKind]:
    """Kinds of a group that its nodes could hold, whatever the model."""
    for tp, pp in product(space.tp, space.pp):
        kind = WorkerKind(group.device, tp, pp)
        if tp <= group.devices_per_node and kind.devices <= group.devices:
            yield kind


def candidates(space: Space, kinds: Sequence[WorkerKind]) -> Iterator[Candidate]:
    """Every candidate that the fleet could hold once."""
    counts = range(1, space.most_workers + 1)
    if Mode.COLOCATED in space.modes:
        for kind, count in product(kinds, counts):
            yield from _if_it_fits(space, Candidate(Mode.COLOCATED, kind, count))
    if Mode.DISAGGREGATED in space.modes:
        for prefill, decode in product(kinds, kinds):
            for prefills, decodes in product(counts, counts):
                pair = Candidate(Mode.DISAGGREGATED, prefill, prefills, decode, decodes)
                yield from _if_it_fits(space, _placed(space, pair))


def _placed(space: Space, pair: Candidate) -> Candidate | None:
    """The pair with its place chosen; None when it would have to leave the node and may not."""
    local = _fits_in_nodes(space, pair)
    if space.affinity is Affinity.LOW:
        return pair if local else None
    if space.affinity is Affinity.AUTO and local:
        return pair
    return Candidate(
        pair.mode, pair.prefill, pair.prefill_workers, pair.decode, pair.decode_workers, same_node=False
    )


def _fits_in_nodes(space: Space, pair: Candidate) -> bool:
    """Whether every prefill stage can share a node with the decode stage of the same layers."""
    if pair.decode is None or pair.prefill.device != pair.decode.device:
        return False
    group = space.group(pair.prefill.device)
    if sum(pair.devices.values()) <= group.devices_per_node:
        return True
    a_stage = pair.prefill_workers * pair.prefill.tp + pair.decode_workers * pair.decode.tp
    stages = pair.prefill.pp
    return stages == pair.decode.pp and a_stage <= group.devices_per_node and stages <= group.nodes


def _if_it_fits(space: Space, candidate: Candidate | None) -> Iterator[Candidate]:
    if candidate is None:
        return
    if all(count <= space.group(name).devices for name, count in candidate.devices.items()):
        yield candidate
