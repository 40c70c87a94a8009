"""Edge: granted transfers of a source that wait until their sink asks for them on its link.

The sink's requests on one link are in the order in which it will take the bytes; serving them in that order
keeps both ends of an ordered transport in step.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtransfer.contract import PeerId, Transfer
from kvtransfer.threads import outlast
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

MEETING_S = 1.0
"""How long a request waits for its transfer to be granted (the two may cross)."""

PAST_KEPT = 256
"""Ended transfers that are remembered, so that a late request for one is refused at once."""


@dataclass(slots=True, eq=False)
class Post:
    """A granted transfer; `stop` ends its serving, which began when it is not None.

    `announced` says that the sink was told, or half told, that its bytes come.
    """

    transfer: Transfer
    blocks: tuple[BlockId, ...]
    part_offset: int
    part_bytes: int
    ended: asyncio.Future[TransferError | None]
    stop: Callable[[], object] | None = None
    stopped: bool = False
    announced: bool = False

    def take(self, stop: Callable[[], object]) -> bool:
        """Begins to serve it; False when it is over, or served already."""
        if self.stopped or self.stop is not None:
            return False
        self.stop = stop
        return True

    def give_up(self) -> None:
        """Ends it: at once, or when its serving has stopped; idempotent."""
        self.stopped = True
        if self.stop is not None:
            self.stop()
        elif not self.ended.done():
            self.ended.set_result(None)


class PostBox:
    """The granted transfers of one transport."""

    def __init__(self) -> None:
        self._posts: dict[tuple[PeerId, int], Post] = {}
        self._past: deque[tuple[PeerId, int]] = deque(maxlen=PAST_KEPT)
        self._added = asyncio.Condition()

    async def serve(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """Waits until a transfer was asked for and served. Raises TransferError when serving it failed.

        When it returns, raises or was cancelled, its serving has ended.
        """
        ended: asyncio.Future[TransferError | None] = asyncio.get_running_loop().create_future()
        post = Post(transfer, tuple(blocks), part_offset, part_bytes, ended)
        place = (sink, transfer.number)
        self._posts[place] = post
        try:
            async with self._added:
                self._added.notify_all()
            error = await asyncio.shield(post.ended)
        except asyncio.CancelledError:
            post.give_up()
            await outlast(post.ended)
            raise
        finally:
            self._posts.pop(place, None)
            self._past.append(place)
        if error is not None:
            raise error

    async def meet(self, sink: PeerId, asked: Transfer) -> Post | None:
        """What was granted under the number that is asked for; None when nothing is within MEETING_S.

        Whether it is the transfer that is asked for is for the caller to see.
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
        """Ends all that wait or are served."""
        for post in tuple(self._posts.values()):
            post.give_up()


def ended_with(error: BaseException | None) -> TransferError | None:
    """What a post's `ended` says about an error of its serving."""
    if error is None or isinstance(error, TransferError):
        return error
    return TransferError(TransferFault.DISCONNECTED, "The transfer was stopped.")
