"""Pure: what `tandem bench kv` measured."""

from dataclasses import dataclass
from typing import Final

from benchmarks.kv_layouts import Layout
from kvtransfer.contract import PullReport, TransferConfig


@dataclass(frozen=True, slots=True)
class Road:
    """One way to move KV: a transport, with or without checksums."""

    transport: str
    checksum: bool

    def config(self) -> TransferConfig:
        """The workers' configuration, but for the transport and the checksums."""
        return TransferConfig(transports=(self.transport,), checksum=self.checksum, lease_s=30.0)


ADOPTING: Final = TransferConfig(transports=("adopt", "shm"), lease_s=30.0)
"""The configuration of workers whose pools lie in one arena, but for the lease."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One pull: what the sink reported, and the whole call as its caller saw it.

    `reserve_s` is what it took before to have blocks for it, where that was done.
    """

    report: PullReport
    pull_s: float
    reserve_s: float = 0.0

    @property
    def beyond_bytes_s(self) -> float:
        """All but the transport's own loop over the bytes."""
        return self.reserve_s + self.pull_s - self.report.copy_s


@dataclass(frozen=True, slots=True)
class HandoffTimes:
    """Hand-offs of the layout's blocks over each road, beside so many processes that compute."""

    layout: Layout
    busy_processes: int
    roads: dict[Road, tuple[Timed, ...]]


@dataclass(frozen=True, slots=True)
class CaseTimes:
    """All rounds of one case; `roads` maps each road to its pulls, one a round.

    `hash_s` is what hashing the blocks takes: the source's share of the checksums, before it is asked.
    """

    layout: Layout
    blocks: int
    memcpy_s: tuple[float, ...]
    raw_tcp_s: tuple[float, ...]
    hash_s: tuple[float, ...]
    roads: dict[Road, tuple[Timed, ...]]

    @property
    def moved_bytes(self) -> int:
        """Bytes of one pull."""
        return self.blocks * self.layout.shape.block_bytes


@dataclass(frozen=True, slots=True)
class AdoptionTimes:
    """Rounds of hand-offs whose blocks change owners, between pools in one arena.

    `adopt_s` is what stands in place of copying: both sides' part in the exchange, their accounts included.
    `commit_s` is the commit in which that is done; `handoff_s` is the whole call, and `copy_s` that of the
    same hand-off with its blocks copied and verified. `first_read_s` is reading a byte of every page right
    after, `later_read_s` doing so again.
    """

    blocks: int
    moved_bytes: int
    adopt_s: tuple[float, ...]
    commit_s: tuple[float, ...]
    handoff_s: tuple[float, ...]
    copy_s: tuple[float, ...]
    first_read_s: tuple[float, ...]
    later_read_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class OverlapFigures:
    """Medians over the rounds, in seconds.

    `prefill_*` until the first token, `landed_*` from there until the KV landed; `ratio` of the latter two is
    what overlap leaves. `limit_s` is what the bytes take on the link, written as `codec` writes them.
    """

    codec: str
    prompt_tokens: int
    link_bytes_per_s: float
    moved_bytes: int
    rounds: int
    limit_s: float
    prefill_afterwards_s: float
    prefill_overlapped_s: float
    landed_afterwards_s: float
    landed_overlapped_s: float
    ratio: float
