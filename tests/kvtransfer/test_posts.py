"""Granted transfers meet the requests for them: in shares or whole, each block once, and they always end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from kvtransfer.contract import BlockRange, PeerId, Transfer
from kvtransfer.posts import Post, PostBox, refusal
from kvtransfer.tcp.framing import Header, HeaderKind
from tandem.errors import TransferError, TransferFault
from tandem.worker import Role
from tests.kvtransfer.pair import blocks, key, record

SINK = PeerId.of(record("decode-0", Role.DECODE))
TRANSFER = Transfer(key("a"), 7, BlockRange(0, 4))
SIZE = 64
WHOLE = Header(HeaderKind.ASK, TRANSFER, 4 * SIZE)
FIRST = Header(HeaderKind.ASK, TRANSFER, 2 * SIZE)
SECOND = Header(HeaderKind.ASK, TRANSFER, 2 * SIZE, 2 * SIZE)
BROKEN = TransferError(TransferFault.DISCONNECTED, "The test broke the link.")


@dataclass(slots=True)
class Granted:
    """A transfer of four blocks that waits in a box."""

    box: PostBox
    serving: asyncio.Task[None]
    post: Post
    stopped: list[str]

    def stop(self, name: str) -> None:
        """What a share is stopped by."""
        self.stopped.append(name)


@asynccontextmanager
async def granted(whole: bool = False) -> AsyncIterator[Granted]:
    """It has ended when the test is over."""
    box = PostBox(whole)
    serving = asyncio.create_task(box.serve(SINK, TRANSFER, blocks(1, 2, 3, 4), 0, SIZE))
    post = await box.meet(SINK, TRANSFER)
    assert post is not None
    made = Granted(box, serving, post, [])
    yield made
    async with asyncio.timeout(5.0):
        await asyncio.wait((serving,))


async def test_transfer_is_over_when_all_its_shares_are_given() -> None:
    async with granted() as made:
        first = made.post.take(FIRST, lambda: made.stop("first"))
        second = made.post.take(SECOND, lambda: made.stop("second"))
        assert first is not None
        assert second is not None
        assert (first.places, second.places) == (range(2), range(2, 4))
        made.post.share_ended(second, None)
        await asyncio.sleep(0)
        assert not made.serving.done()
        made.post.share_ended(first, None)
    assert made.serving.exception() is None
    assert made.stopped == []


async def test_blocks_are_given_once() -> None:
    async with granted() as made:
        first = made.post.take(FIRST, lambda: None)
        assert made.post.take(WHOLE, lambda: None) is None
        assert refusal(WHOLE, made.post).fault is TransferFault.REFUSED
        assert first is not None
        made.post.give_up()
        made.post.share_ended(first, None)


async def test_share_that_fails_stops_the_others_and_ends_the_transfer_with_its_fault() -> None:
    async with granted() as made:
        first = made.post.take(FIRST, lambda: made.stop("first"))
        second = made.post.take(SECOND, lambda: made.stop("second"))
        assert first is not None
        assert second is not None
        made.post.share_ended(first, BROKEN)
        assert made.stopped == ["second"]
        with pytest.raises(TransferError):
            made.post.check()
        made.post.share_ended(second, None)
    assert made.serving.exception() is BROKEN


async def test_transfer_that_is_given_up_ends_although_a_share_of_it_was_never_asked_for() -> None:
    """The share that ran came to its end before it saw that it should stop."""
    async with granted() as made:
        first = made.post.take(FIRST, lambda: made.stop("first"))
        assert first is not None
        made.serving.cancel()
        await asyncio.sleep(0)
        assert made.stopped == ["first"]
        assert not made.serving.done(), "the share still runs"
        made.post.share_ended(first, None)
    assert made.serving.cancelled()


async def test_nothing_is_given_once_it_is_given_up() -> None:
    async with granted() as made:
        made.box.give_up_all()
        assert made.post.take(WHOLE, lambda: None) is None
    assert await made.box.meet(SINK, TRANSFER) is None


async def test_ordered_transport_gives_a_transfer_in_one_share_only() -> None:
    async with granted(whole=True) as made:
        assert made.post.take(FIRST, lambda: None) is None
        assert refusal(FIRST, made.post).fault is TransferFault.LENGTH
        share = made.post.take(WHOLE, lambda: None)
        assert share is not None
        made.post.share_ended(share, None)


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        pytest.param(replace(WHOLE, length_bytes=0), TransferFault.LENGTH, id="nothing"),
        pytest.param(replace(WHOLE, length_bytes=5 * SIZE), TransferFault.LENGTH, id="more than there is"),
        pytest.param(replace(WHOLE, offset_bytes=SIZE), TransferFault.LENGTH, id="beyond the end"),
        pytest.param(replace(WHOLE, length_bytes=SIZE - 1), TransferFault.LENGTH, id="not whole blocks"),
        pytest.param(replace(WHOLE, offset_bytes=(1 << 64) - 1), TransferFault.LENGTH, id="far away"),
        pytest.param(
            replace(WHOLE, transfer=replace(TRANSFER, block_range=BlockRange(0, 3))),
            TransferFault.LENGTH,
            id="another range",
        ),
        pytest.param(
            replace(WHOLE, transfer=replace(TRANSFER, key=key("a", 0))),
            TransferFault.STALE_EPOCH,
            id="a stale epoch",
        ),
        pytest.param(
            replace(WHOLE, transfer=replace(TRANSFER, key=key("b"))), TransferFault.REFUSED, id="another leg"
        ),
    ],
)
async def test_request_that_does_not_fit_is_refused_by_name(asked: Header, fault: TransferFault) -> None:
    async with granted() as made:
        assert made.post.take(asked, lambda: None) is None
        assert refusal(asked, made.post).fault is fault
        made.post.give_up()


async def test_request_for_what_nobody_granted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.posts.MEETING_S", 0.0)
    assert await PostBox(False).meet(SINK, TRANSFER) is None
    assert refusal(WHOLE, None).fault is TransferFault.REFUSED
