"""Edge: granted transfers of a source that wait until their sink asks for them on its link.

The sink's requests on one link are in the order in which it will take the bytes; serving them in that order
keeps both ends of an ordered transport in step.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvtransfer.contract import PeerId, Transfer
from kvtransfer.tcp import framing
from kvtransfer.tcp.framing import Header, HeaderKind
from kvtransfer.threads import outlast
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

MEETING_S = 1.0
"""How long a request waits for its transfer to be granted (the two may cross)."""

PAST_KEPT = 256
"""Ended transfers that are remembered, so that a late request for one is refused at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """Blocks of a transfer, by their places in it, that are being given; `stop` makes that end soon."""

    places: range
    stop: Callable[[], object]


@dataclass(slots=True, eq=False)
class Post:
    """A granted transfer that waits for its sink, or is given to it in shares, each on a connection.

    With `whole` it is given in one share only. `ended` is set when all of it was given, or nothing of it will
    be given any more. All but `check` is called on the event loop.
    """

    transfer: Transfer
    blocks: tuple[BlockId, ...]
    part_offset: int
    part_bytes: int
    whole: bool
    ended: asyncio.Future[TransferError | None]
    _shares: set[Share] = field(default_factory=set)
    _given: set[int] = field(default_factory=set)
    _failure: TransferError | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)

    def take(self, asked: Header, stop: Callable[[], object]) -> Share | None:
        """Begins to give what was asked for; None when that is not to be had (any more)."""
        places = self._places(asked)
        if asked.transfer != self.transfer or places is None:
            return None
        if self._stopped.is_set() or not self._given.isdisjoint(places):
            return None
        share = Share(places, stop)
        self._given.update(places)
        self._shares.add(share)
        return share

    def share_ended(self, share: Share, error: TransferError | None) -> None:
        """No more of a share is given; one that failed ends the transfer."""
        self._shares.discard(share)
        if error is not None:
            self._failure = self._failure or error
            self.give_up()
        self._end_if_over()

    def give_up(self) -> None:
        """Ends it: at once, or when all shares have stopped; idempotent."""
        self._stopped.set()
        for share in tuple(self._shares):
            share.stop()
        self._end_if_over()

    def check(self) -> None:
        """Raises TransferError when the giving should end; from any thread."""
        if self._stopped.is_set():
            raise TransferError(TransferFault.REFUSED, "The source ended the transfer.")

    def fault_of(self, asked: Header) -> TransferFault:
        """Why a request that was not taken is refused."""
        return framing.fault_of_ask(asked, self.transfer, self._places(asked) is not None)

    def _places(self, asked: Header) -> range | None:
        """The places that a request is for; None when no blocks of the transfer are so long."""
        size, count = self.part_bytes, len(self.blocks)
        places = range(asked.offset_bytes // size, (asked.offset_bytes + asked.length_bytes) // size)
        uneven = asked.offset_bytes % size or asked.length_bytes % size
        if uneven or not places or places.stop > count or (self.whole and len(places) < count):
            return None
        return places

    def _end_if_over(self) -> None:
        over = self._stopped.is_set() or len(self._given) == len(self.blocks)
        if over and not self._shares and not self.ended.done():
            self.ended.set_result(self._failure)


class PostBox:
    """The granted transfers of one transport; `whole`: each is given in one share only."""

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self._posts: dict[tuple[PeerId, int], Post] = {}
        self._past: deque[tuple[PeerId, int]] = deque(maxlen=PAST_KEPT)
        self._added = asyncio.Condition()

    async def serve(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """Waits until a transfer was asked for and given. Raises TransferError when giving it failed.

        When it returns, raises or was cancelled, nothing of it is given any more.
        """
        ended: asyncio.Future[TransferError | None] = asyncio.get_running_loop().create_future()
        post = Post(transfer, tuple(blocks), part_offset, part_bytes, self._whole, ended)
        place = (sink, transfer.number)
        self._posts[place] = post
        try:
            async with self._added:
                self._added.notify_all()
            error = await asyncio.shield(ended)
        except asyncio.CancelledError:
            post.give_up()
            await outlast(ended)
            raise
        finally:
            self._posts.pop(place, None)
            self._past.append(place)
        if error is not None:
            raise error

    async def meet(self, sink: PeerId, asked: Transfer) -> Post | None:
        """What was granted under the number that is asked for; None when nothing is within MEETING_S.

        Whether it is the transfer that is asked for is seen when it is taken.
        """
        place = (sink, asked.number)
        if place in self._past:
            return None
        try:
            async with asyncio.timeout(MEETING_S), self._added:
                await self._added.wait_for(lambda: place in self._posts)
        except TimeoutError:
            return None
        return self._posts.get(place)

    def give_up_all(self) -> None:
        """Ends all that wait or are given."""
        for post in tuple(self._posts.values()):
            post.give_up()


def refusal(asked: Header, post: Post | None) -> Header:
    """What a sink is told whose request was not taken; `post` is what it met, if anything."""
    fault = framing.fault_of_ask(asked, None, False) if post is None else post.fault_of(asked)
    return Header(HeaderKind.REFUSED, asked.transfer, 0, fault=fault)
