"""Edge: what all pulls of a sink share, and what one of them wants."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field

from kvtransfer.contract import BlockMemory, BlockRange, SinkTransport, TransferConfig
from kvtransfer.handoffs.priority import PriorityGate
from kvtransfer.handoffs.roads import Roads
from kvtransfer.handoffs.sources import KnownSource, KnownSources
from kvtransfer.handoffs.words import SinkTimes
from kvtransfer.hashing import Hasher
from tandem.ids import BlockId


@dataclass(frozen=True, slots=True)
class PullTools:
    """What all pulls of a sink share."""

    memory: BlockMemory
    config: TransferConfig
    times: SinkTimes
    clock: Callable[[], float]
    transports: Mapping[str, SinkTransport]
    sources: KnownSources
    roads: Roads
    gate: PriorityGate
    executor: Executor
    hashers: Mapping[str, Hasher]
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))


OnPiece = Callable[[BlockRange], object]
"""Is told on the event loop of a piece that landed; what it holds is right only if its pull succeeds."""


@dataclass(frozen=True, slots=True)
class PullOrder:
    """What one pull wants: `block_range` into `targets`; `deadline_s` on the sink's clock.

    `on_piece` is told of each piece when it has landed, once more if it was wrong and was moved again.
    """

    source: KnownSource
    block_range: BlockRange
    targets: tuple[BlockId, ...]
    priority: int
    deadline_s: float
    on_piece: OnPiece
