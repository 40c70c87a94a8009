"""Edge: one piece given over a transport where the source sends."""

import structlog

from kvtransfer.contract import SourceTransport, Transfer
from kvtransfer.handoffs.offers import Piece, PullAsk
from tandem.errors import TransferError

_log = structlog.get_logger("tandem.kvtransfer")


async def sent(transport: SourceTransport, ask: PullAsk, piece: Piece) -> bool:
    """Whether all blocks were given."""
    granted = Transfer(ask.transfer.key, ask.transfer.number, piece.block_range)
    try:
        await transport.send(ask.sink, granted, piece.blocks, piece.part_offset, piece.part_bytes)
    except TransferError as error:
        _log.info("send failed", leg=ask.transfer.key.leg_id, fault=error.fault.value, error=str(error))
        return False
    return True
