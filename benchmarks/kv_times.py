"""Pure: what `tandem bench kv` measured."""

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Timed:
    """One pull: what the sink reported, and the whole call as its caller saw it."""

    report: PullReport
    pull_s: float


@dataclass(frozen=True, slots=True)
class CaseTimes:
    """All rounds of one case; `roads` maps each road to its pulls, one a round."""

    layout: Layout
    blocks: int
    memcpy_s: tuple[float, ...]
    raw_tcp_s: tuple[float, ...]
    roads: dict[Road, tuple[Timed, ...]]

    @property
    def moved_bytes(self) -> int:
        """Bytes of one pull."""
        return self.blocks * self.layout.shape.block_bytes
