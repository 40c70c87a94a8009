"""Edge: the checksums of what a source offers, computed in a thread: before it is asked for, if it can be."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import structlog

from kvtransfer.checksums import piece_checksum
from kvtransfer.contract import BlockMemory, HandoffKey
from kvtransfer.handoffs.offers import Offer, Piece
from kvtransfer.handoffs.pieces import complete
from kvtransfer.hashing import Hasher
from tandem.errors import TransferError
from tandem.ids import BlockId

_log = structlog.get_logger("tandem.kvtransfer")

ResultT = TypeVar("ResultT")


class PieceSums:
    """Hashes offers and granted pieces.

    `on_read_ended` is called when a thread reads an offer's blocks no more; `ahead` is the hasher for offers
    that nobody has asked for yet (None: those are not hashed).
    """

    def __init__(
        self, on_read_ended: Callable[[Offer], object], ahead: Hasher | None, memory: BlockMemory
    ) -> None:
        self._on_read_ended = on_read_ended
        self._hasher_ahead = ahead
        self._block_bytes = memory.block_bytes
        self._layers = memory.block_bytes // memory.layer_bytes
        self._ahead: dict[HandoffKey, asyncio.Future[tuple[int, ...] | None]] = {}
        self._running: dict[tuple[HandoffKey, int], asyncio.Future[int | None]] = {}
        self._stops: dict[HandoffKey, threading.Event] = {}
        self._executor = ThreadPoolExecutor(1, "kv-checksum")

    def offered(self, offer: Offer) -> None:
        """Hashes the blocks of an offer once all are there, unless a sink has begun to pull them.

        The offer waits for its sink then; later its transfer would share cores and memory with the hashing.
        """
        hasher, key = self._hasher_ahead, offer.machine.key
        if hasher is None or offer.pieces or key in self._ahead:
            return
        large = len(offer.blocks) * self._block_bytes > hasher.inline_bytes
        if large and complete(offer.ready, len(offer.blocks), self._layers):
            work = partial(_sums, hasher, offer.blocks, 0, self._block_bytes)
            self._ahead[key] = self._begun(offer, work)

    def begin(self, offer: Offer, number: int, piece: Piece, hasher: Hasher) -> None:
        """Starts on a piece that was granted, so that its checksum is there when the sink commits."""
        if piece.length_bytes > hasher.inline_bytes and not self._is_ahead(offer, piece, hasher):
            work = partial(_checksum, hasher, piece)
            self._running[offer.machine.key, number] = self._begun(offer, work)

    async def mismatched(self, offer: Offer, landed: Mapping[int, int], hasher: Hasher) -> tuple[int, ...]:
        """The transfers (number -> the sink's checksum) whose bytes are not ours.

        The last one that was granted must be among them: a sink that leaves it out holds nothing of it.
        """
        wrong = [
            number for number, theirs in landed.items() if await self._of(offer, number, hasher) != theirs
        ]
        last = offer.machine.number
        piece = None if last is None else offer.pieces.get(last)
        if last is not None and piece is not None and piece.blocks and last not in landed:
            wrong.append(last)
        return tuple(wrong)

    def forget(self, key: HandoffKey) -> None:
        """Drops what is known of a hand-off that ended."""
        for place in [place for place in self._running if place[0] == key]:
            del self._running[place]
        self._ahead.pop(key, None)
        self._stops.pop(key, None)

    def close(self) -> None:
        """Ends the thread; what runs must have been stopped."""
        self._executor.shutdown(wait=True)

    def _begun(self, offer: Offer, work: Callable[[Callable[[], bool]], ResultT]) -> asyncio.Future[ResultT]:
        """Runs work, which is told how to see that it should stop, in the thread."""
        stop = self._stops.setdefault(offer.machine.key, threading.Event())
        offer.stop_hashing = stop.set
        offer.machine.read_started()
        begun = asyncio.get_running_loop().run_in_executor(self._executor, work, stop.is_set)
        begun.add_done_callback(lambda _ended: self._on_read_ended(offer))
        return begun

    def _is_ahead(self, offer: Offer, piece: Piece, hasher: Hasher) -> bool:
        """Whether the piece's blocks are hashed as parts of the offer: as a whole, and by this hasher."""
        return (
            offer.machine.key in self._ahead
            and piece.part_bytes == self._block_bytes
            and self._hasher_ahead is not None
            and hasher.name == self._hasher_ahead.name
        )

    async def _of(self, offer: Offer, number: int, hasher: Hasher) -> int | None:
        piece = offer.pieces.get(number)
        if piece is not None and self._is_ahead(offer, piece, hasher):
            sums = await asyncio.shield(self._ahead[offer.machine.key])
            part = piece.block_range
            end = part.first_block + part.num_blocks
            return None if sums is None else piece_checksum(sums[part.first_block : end])
        running = self._running.get((offer.machine.key, number))
        if running is not None:
            return await asyncio.shield(running)
        if piece is None or piece.length_bytes > hasher.inline_bytes:
            return None
        return _checksum(hasher, piece, lambda: False)


def _checksum(hasher: Hasher, piece: Piece, stopped: Callable[[], bool]) -> int | None:
    """The piece's checksum; None when it was stopped or cannot be computed, which matches nothing."""
    sums = _sums(hasher, piece.blocks, piece.part_offset, piece.part_bytes, stopped)
    return None if sums is None else piece_checksum(sums)


def _sums(
    hasher: Hasher,
    blocks: Sequence[BlockId],
    part_offset: int,
    part_bytes: int,
    stopped: Callable[[], bool],
) -> tuple[int, ...] | None:
    """Those of the blocks; None when it was stopped or they cannot be computed."""
    try:
        return hasher.sums(blocks, part_offset, part_bytes, stopped)
    except TransferError as error:
        _log.info("blocks were not hashed", fault=error.fault.value, error=str(error))
        return None
