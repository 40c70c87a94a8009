"""Edge: the transfers that this process sends itself, each in a task that ends with its hand-off."""

import asyncio
from collections.abc import Callable
from functools import partial

import structlog

from kvtransfer.contract import SourceTransport, Transfer
from kvtransfer.handoffs.offers import Offer, Piece, PullAsk
from tandem.errors import TransferError

_log = structlog.get_logger("tandem.kvtransfer")


class Sends:
    """Runs them; `on_ended` is called when one of an offer has ended and was noted. `clock` is monotonic."""

    def __init__(self, clock: Callable[[], float], on_ended: Callable[[Offer], object]) -> None:
        self._clock = clock
        self._on_ended = on_ended
        self._running: set[asyncio.Task[bool]] = set()

    def begin(self, offer: Offer, ask: PullAsk, transport: SourceTransport, piece: Piece) -> None:
        """Sends a piece that was granted, until `offer.stop_sending` is called at the latest."""
        number = ask.transfer.number
        offer.machine.send_started(number, self._clock())
        task = asyncio.create_task(_sent(transport, ask, piece))
        offer.stop_sending = task.cancel
        self._running.add(task)
        # A callback and not a `finally`: a task that is cancelled before its first step runs neither.
        task.add_done_callback(partial(self._ended, offer, number))

    async def close(self) -> None:
        """Ends all of them; idempotent."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _ended(self, offer: Offer, number: int, task: asyncio.Task[bool]) -> None:
        self._running.discard(task)
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            _log.error("send broke", leg=offer.machine.key.leg_id, exc_info=failure)
        succeeded = not task.cancelled() and failure is None and task.result()
        offer.machine.send_ended(number, succeeded, self._clock())
        self._on_ended(offer)


async def _sent(transport: SourceTransport, ask: PullAsk, piece: Piece) -> bool:
    """Whether all blocks were given."""
    granted = Transfer(ask.transfer.key, ask.transfer.number, piece.block_range)
    try:
        await transport.send(ask.sink, granted, piece.blocks, piece.part_offset, piece.part_bytes)
    except TransferError as error:
        _log.info("send failed", leg=ask.transfer.key.leg_id, fault=error.fault.value, error=str(error))
        return False
    return True
