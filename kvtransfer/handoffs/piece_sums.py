"""Edge: the checksums of what a source granted, computed in a thread while the bytes move."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import structlog

from kvtransfer.checksums import piece_checksum
from kvtransfer.contract import HandoffKey
from kvtransfer.handoffs.offers import Offer, Piece
from kvtransfer.hashing import Hasher
from tandem.errors import TransferError

_log = structlog.get_logger("tandem.kvtransfer")


class PieceSums:
    """Hashes granted pieces; `on_read_ended` is called when a thread reads an offer's blocks no more."""

    def __init__(self, on_read_ended: Callable[[Offer], object]) -> None:
        self._on_read_ended = on_read_ended
        self._running: dict[tuple[HandoffKey, int], asyncio.Future[int | None]] = {}
        self._stops: dict[HandoffKey, threading.Event] = {}
        self._executor = ThreadPoolExecutor(1, "kv-checksum")

    def begin(self, offer: Offer, number: int, piece: Piece, hasher: Hasher) -> None:
        """Starts on a piece that was granted, so that its checksum is there when the sink commits."""
        if piece.length_bytes <= hasher.inline_bytes:
            return
        stop = self._stops.setdefault(offer.machine.key, threading.Event())
        offer.stop_hashing = stop.set
        offer.machine.read_started()
        work = partial(_checksum, hasher, piece, stop.is_set)
        running = asyncio.get_running_loop().run_in_executor(self._executor, work)
        self._running[offer.machine.key, number] = running
        running.add_done_callback(lambda _ended: self._on_read_ended(offer))

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
        self._stops.pop(key, None)

    def close(self) -> None:
        """Ends the thread; what runs must have been stopped."""
        self._executor.shutdown(wait=True)

    async def _of(self, offer: Offer, number: int, hasher: Hasher) -> int | None:
        running = self._running.get((offer.machine.key, number))
        if running is not None:
            return await asyncio.shield(running)
        piece = offer.pieces.get(number)
        if piece is None or piece.length_bytes > hasher.inline_bytes:
            return None
        return _checksum(hasher, piece, lambda: False)


def _checksum(hasher: Hasher, piece: Piece, stopped: Callable[[], bool]) -> int | None:
    """The piece's checksum; None when it was stopped or cannot be computed, which matches nothing."""
    try:
        return piece_checksum(hasher.sums(piece.blocks, piece.part_offset, piece.part_bytes, stopped))
    except TransferError as error:
        _log.info("a piece was not hashed", fault=error.fault.value, error=str(error))
        return None
