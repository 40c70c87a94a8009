"""What becomes of transfers that this process sends itself, whatever their transport does."""

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest
from structlog.testing import capture_logs

from kvtransfer.contract import BlockRange, KvReady, OnRefused, PeerId, Transfer
from kvtransfer.handoffs.offers import Offer, Piece, PullAsk
from kvtransfer.handoffs.sends import Sends
from kvtransfer.handoffs.source_protocol import SourceHandoff
from kvtransfer.handoffs.words import HandoffState, SourceTimes
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId
from tandem.worker import Role
from tests.kvtransfer.pair import blocks, key, record

SINK = PeerId.of(record("decode-0", Role.DECODE))


class Breaking:
    """A transport whose sends raise."""

    name = "breaking"
    direct = False
    same_host = False

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def start(self, on_link_lost: Callable[[PeerId], None], on_refused: OnRefused) -> None:
        """See SourceTransport."""

    def endpoint(self, sink: PeerId, ticket: bytes) -> str | None:
        """See SourceTransport."""
        return None

    def forget(self, sink: PeerId) -> None:
        """See SourceTransport."""

    async def send(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """Raises."""
        raise self._error

    async def close(self) -> None:
        """See SourceTransport."""


@pytest.mark.parametrize(
    ("error", "event", "level"),
    [
        (TransferError(TransferFault.DISCONNECTED, "The link broke."), "send failed", "info"),
        (ValueError("nobody thought of this"), "send broke", "error"),
    ],
)
async def test_send_that_fails_is_told_and_leaves_the_blocks_unread(
    error: Exception, event: str, level: str
) -> None:
    machine = SourceHandoff(key("a"), SourceTimes(30.0, 5.0, 0.25, 1.0, 10.0), time.monotonic())
    offer = Offer(machine, blocks(0), KvReady(1, 1))
    ask = PullAsk(SINK, "d", "breaking", Transfer(key("a"), 1, BlockRange(0, 1)))
    assert machine.pull(SINK, 1, False, time.monotonic())
    ended = asyncio.Event()
    sends = Sends(time.monotonic, lambda _offer: ended.set())
    with capture_logs() as told:
        sends.begin(offer, ask, Breaking(error), Piece(BlockRange(0, 1), blocks(0), 0, 1))
        reads = [machine.reads_running]
        await asyncio.wait_for(ended.wait(), 5.0)
        reads.append(machine.reads_running)
    assert [(line["event"], line["log_level"]) for line in told] == [(event, level)]
    assert reads == [True, False]
    assert machine.state is HandoffState.ACCEPTED
