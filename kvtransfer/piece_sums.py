"""Edge: the checksums of what a source granted, computed in a thread while the bytes move."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from kvtransfer.checksums import block_checksum, part_of, piece_checksum
from kvtransfer.contract import BlockMemory, HandoffKey
from kvtransfer.offers import Offer, Piece

INLINE_BYTES = 1 << 20
"""Up to so many bytes are hashed on the event loop: a tenth of a millisecond, less than a thread costs."""


class PieceSums:
    """Hashes granted pieces; `on_read_ended` is called when a thread reads an offer's blocks no more."""

    def __init__(self, memory: BlockMemory, on_read_ended: Callable[[Offer], object]) -> None:
        self._memory = memory
        self._on_read_ended = on_read_ended
        self._running: dict[tuple[HandoffKey, int], asyncio.Future[int | None]] = {}
        self._stops: dict[HandoffKey, threading.Event] = {}
        self._executor = ThreadPoolExecutor(1, "kv-checksum")

    def begin(self, offer: Offer, number: int, piece: Piece) -> None:
        """Starts on a piece that was granted, so that its checksum is there when the sink commits."""
        if piece.length_bytes <= INLINE_BYTES:
            return
        stop = self._stops.setdefault(offer.machine.key, threading.Event())
        offer.stop_hashing = stop.set
        offer.machine.read_started()
        work = partial(_checksum, self._memory, piece, stop.is_set)
        running = asyncio.get_running_loop().run_in_executor(self._executor, work)
        self._running[offer.machine.key, number] = running
        running.add_done_callback(lambda _ended: self._on_read_ended(offer))

    async def mismatched(self, offer: Offer, landed: Mapping[int, int]) -> tuple[int, ...]:
        """The transfers (number -> the sink's checksum) whose bytes are not ours.

        The last one that was granted must be among them: a sink that leaves it out holds nothing of it.
        """
        wrong = [number for number, theirs in landed.items() if await self._of(offer, number) != theirs]
        last = offer.machine.number
        piece = None if last is None else offer.pieces.get(last)
        if last is not None and piece is not None and piece.blocks and last not in landed:
            wrong.append(last)
        return tuple(wrong)

    def forget(self, key: HandoffKey) -> None:
        """Drops what is known of a hand-off that ended."""
        for place in [place for place in self._running if place[0] == key]:
            del self._running[place]
        self._stops.pop(key, None)

    def close(self) -> None:
        """Ends the thread; what runs must have been stopped."""
        self._executor.shutdown(wait=True)

    async def _of(self, offer: Offer, number: int) -> int | None:
        running = self._running.get((offer.machine.key, number))
        if running is not None:
            return await asyncio.shield(running)
        piece = offer.pieces.get(number)
        if piece is None or piece.length_bytes > INLINE_BYTES:
            return None
        return _checksum(self._memory, piece, lambda: False)


def _checksum(memory: BlockMemory, piece: Piece, stopped: Callable[[], bool]) -> int | None:
    """The piece's checksum; None when it was stopped, which matches nothing."""
    sums = []
    for block in piece.blocks:
        if stopped():
            return None
        sums.append(block_checksum(part_of(memory, block, piece.part_offset, piece.part_bytes)))
    return piece_checksum(sums)
