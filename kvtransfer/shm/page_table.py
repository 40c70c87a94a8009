"""Pure: which pages lie behind each block of a pool that exchanges pages with other processes' pools.

A frame is the room of one block in some process's shared memory (a segment). Every block has exactly one
frame, and an exchange gives as many frames as it takes, so a pool never grows or shrinks. The giving side
decides: until it settles, both sides keep their frames; what the taking side offered stays out of use until
it knows the outcome. See docs/decisions/004-adopting-pages.md.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final, NewType

import numpy as np
import numpy.typing as npt

from tandem.errors import ProtocolError
from tandem.ids import BlockId

SegmentId = NewType("SegmentId", int)
"""Names one shared memory for ever: 63 random bits, drawn when it is made."""


Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """Frames in the order of some blocks: frame i is the bytes of block `indices[i]` of `segments[i]`."""

    segments: Numbers
    indices: Numbers

    def __len__(self) -> int:
        """How many frames."""
        return len(self.indices)


@dataclass(frozen=True, slots=True)
class Mapping:
    """`count` blocks from `block` on, behind which lie as many frames of a segment from `index` on."""

    block: BlockId
    segment: SegmentId
    index: int
    count: int


class ExchangeState(Enum):
    """Where one exchange stands on one side."""

    OPEN = "open"
    SETTLED = "settled"
    CANCELLED = "cancelled"


class ExchangeInput(Enum):
    """What ends an exchange."""

    SETTLE = "settle"
    CANCEL = "cancel"


TRANSITIONS: Final = MappingProxyType(
    {
        (ExchangeState.OPEN, ExchangeInput.SETTLE): ExchangeState.SETTLED,
        (ExchangeState.OPEN, ExchangeInput.CANCEL): ExchangeState.CANCELLED,
        (ExchangeState.SETTLED, ExchangeInput.SETTLE): ExchangeState.SETTLED,
        (ExchangeState.CANCELLED, ExchangeInput.CANCEL): ExchangeState.CANCELLED,
    }
)
"""Another input is a protocol error: what was settled can't be undone, nor the other way round."""


@dataclass(slots=True)
class _Exchange:
    """Blocks whose frames are on offer."""

    blocks: Numbers
    frames: Frames
    state: ExchangeState = ExchangeState.OPEN


class PageTable:
    """Owns the frames behind one pool's blocks; `segment` is the pool's own shared memory."""

    def __init__(self, segment: SegmentId, num_blocks: int) -> None:
        self._segments = np.full(num_blocks, segment, dtype=np.int64)
        self._indices = np.arange(num_blocks, dtype=np.int64)
        self._leaving = np.zeros(num_blocks, dtype=np.bool_)
        self._exchanges: dict[int, _Exchange] = {}

    def frames_of(self, blocks: Sequence[BlockId]) -> Frames:
        """What lies behind the blocks now."""
        return self._frames(np.asarray(blocks, dtype=np.int64))

    @property
    def segments(self) -> frozenset[SegmentId]:
        """Whose memory is in use here."""
        return frozenset(SegmentId(int(segment)) for segment in np.unique(self._segments))

    def in_exchange(self, block: BlockId) -> bool:
        """Whether a block's frame is on offer, so that it must be neither used nor given to anybody."""
        return bool(self._leaving[block])

    def begin(self, number: int, blocks: Sequence[BlockId]) -> Frames:
        """Puts the frames of blocks on offer. Raises ProtocolError for what is in use or not there."""
        chosen = np.asarray(blocks, dtype=np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self._indices)):
            raise ProtocolError(f"Exchange {number} names a block that is not in the pool.")
        if number in self._exchanges or self._leaving[chosen].any() or len(np.unique(chosen)) != len(chosen):
            raise ProtocolError(f"Exchange {number} names what is in an exchange already.")
        frames = self._frames(chosen)
        self._exchanges[number] = _Exchange(chosen, frames)
        self._leaving[chosen] = True
        return frames

    def settle(self, number: int, theirs: Frames) -> list[Mapping]:
        """The exchange holds: what to map where, in runs; nothing when that was said before.

        Raises ProtocolError when it was cancelled, is not known, or the other side gives another number.
        """
        exchange = self._known(number)
        before = exchange.state
        if before is ExchangeState.OPEN and len(theirs) != len(exchange.blocks):
            raise ProtocolError(f"{len(theirs)} frames were given for {len(exchange.blocks)} blocks.")
        self._end(exchange, ExchangeInput.SETTLE)
        if before is not ExchangeState.OPEN:
            return []
        self._segments[exchange.blocks] = theirs.segments
        self._indices[exchange.blocks] = theirs.indices
        return mappings_of(exchange.blocks, theirs)

    def cancel(self, number: int) -> None:
        """Nothing is exchanged. Raises ProtocolError when it was settled or is not known."""
        self._end(self._known(number), ExchangeInput.CANCEL)

    def given_away(self, number: int) -> Frames | None:
        """The frames that a settled exchange gave away; None while it is open or when it was cancelled.

        Raises ProtocolError when it is not known.
        """
        exchange = self._known(number)
        return exchange.frames if exchange.state is ExchangeState.SETTLED else None

    def forget(self, number: int) -> None:
        """Drops an exchange that ended, once the other side can't ask any more.

        Raises ProtocolError while it is open or when it is not known.
        """
        if self._known(number).state is ExchangeState.OPEN:
            raise ProtocolError(f"Exchange {number} has not ended.")
        del self._exchanges[number]

    def _frames(self, chosen: Numbers) -> Frames:
        return Frames(self._segments[chosen], self._indices[chosen])

    def _known(self, number: int) -> _Exchange:
        exchange = self._exchanges.get(number)
        if exchange is None:
            raise ProtocolError(f"Exchange {number} is not known.")
        return exchange

    def _end(self, exchange: _Exchange, given: ExchangeInput) -> None:
        following = TRANSITIONS.get((exchange.state, given))
        if following is None:
            raise ProtocolError(f"An exchange that is {exchange.state.value} can't {given.value}.")
        if exchange.state is ExchangeState.OPEN:
            self._leaving[exchange.blocks] = False
        exchange.state = following


def mappings_of(blocks: Numbers, frames: Frames) -> list[Mapping]:
    """Blocks that follow each other and whose frames do, too, are one mapping: one system call."""
    if len(blocks) == 0:
        return []
    breaks = (np.diff(blocks) != 1) | (np.diff(frames.indices) != 1) | (np.diff(frames.segments) != 0)
    bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(blocks)]
    return [
        Mapping(
            BlockId(int(blocks[first])),
            SegmentId(int(frames.segments[first])),
            int(frames.indices[first]),
            after - first,
        )
        for first, after in itertools.pairwise(bounds)
    ]
