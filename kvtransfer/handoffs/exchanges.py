"""Edge: a source's blocks that are given away with a commit."""

from kvtransfer.contract import KvGiver
from kvtransfer.handoffs.offers import FrameExchange, Offer
from kvtransfer.shm.adopt import ADOPT
from tandem.errors import TransferError, TransferFault


class Exchanges:
    """Gives an offer's blocks to its sink; `giver` has the legs that they belong to."""

    def __init__(self, giver: KvGiver | None) -> None:
        self._giver = giver

    def give(self, offer: Offer, exchange: FrameExchange) -> bool:
        """Whether the blocks are the sink's now; False while something here touches them.

        Raises TransferError (LENGTH) for blocks that there are not, or that were granted to be moved.
        """
        first, taken = exchange.first_block, exchange.frames
        given = offer.blocks[first : first + len(taken)]
        if len(given) != len(taken) or offer.transport != ADOPT or self._giver is None:
            message = "What was not granted to be adopted cannot be."
            raise TransferError(TransferFault.LENGTH, message)
        if offer.machine.reads_running:
            return False
        return self._giver.give(offer.machine.key.leg_id, exchange.member, given, taken)
