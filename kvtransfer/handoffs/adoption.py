"""Edge: the blocks of one pull that change owners instead of being copied.

What is granted over the adopt transport is noted. Around the commit the sink's own blocks are on offer in the
arena; afterwards, and however the commit went, the arena says which of them the source has taken, and the
source's are the sink's in their stead.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvtransfer.contract import FrameArena, PullGrant
from kvtransfer.handoffs.offers import FrameExchange
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

Pairs = tuple[tuple[BlockId, BlockId], ...]
"""(block that left, block that came) of this pool; each has the other's place."""

OnExchanged = Callable[[Pairs], None]
"""Is told, on the event loop and before anything else happens to a pull, which blocks changed owners."""


class Adoption:
    """The source's blocks at their places in `targets`; `first_block` is the leg's index of the first."""

    def __init__(
        self, arena: FrameArena, first_block: int, targets: Sequence[BlockId], on_exchanged: OnExchanged
    ) -> None:
        self._arena = arena
        self._first_block = first_block
        self._targets = tuple(targets)
        self._on_exchanged = on_exchanged
        self._sources: dict[int, BlockId] = {}
        self.complete = False

    def note(self, grant: PullGrant) -> None:
        """Where granted blocks lie. Raises TransferError (LENGTH) for one that is not in the arena."""
        first = grant.transfer.block_range.first_block - self._first_block
        for index, block in enumerate(grant.source_blocks, start=first):
            if block >= self._arena.num_blocks:
                raise TransferError(TransferFault.LENGTH, "A granted block lies outside of the arena.")
            self._sources[index] = block

    @contextmanager
    def on_offer(self, giver: int) -> Iterator[FrameExchange]:
        """Our blocks are on offer inside; behind it what the giver took has changed owners (`complete`: all).

        Raises TransferError: LENGTH when not all blocks were granted, REFUSED when ours are on offer already.
        """
        if len(self._sources) != len(self._targets):
            raise TransferError(TransferFault.LENGTH, "Not all blocks were granted.")
        given = [self._sources[index] for index in range(len(self._targets))]
        self._arena.offer(giver, self._targets)
        try:
            yield FrameExchange(self._arena.member, self._first_block, self._targets)
        finally:
            pairs = self._arena.settle(giver, given, self._targets)
            self.complete = len(pairs) == len(given)
            if pairs:
                self._on_exchanged(pairs)
