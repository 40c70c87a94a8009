"""Pure: the hand-off's words as messages of worker.proto, and back."""

import math
from collections.abc import Mapping
from typing import Final

from kvtransfer.contract import BlockRange, HandoffKey, HeadRange, PeerId, PullGrant, Transfer
from kvtransfer.handoffs.offers import FrameExchange, Piece
from kvtransfer.handoffs.words import HandoffState
from tandem.ids import BlockId, Incarnation, LegId, WorkerId
from tandem.v1 import worker_pb2 as pb

STATE_TO_WIRE: Final = {
    None: pb.HANDOFF_STATE_UNSPECIFIED,
    HandoffState.OFFERED: pb.HANDOFF_STATE_OFFERED,
    HandoffState.ACCEPTED: pb.HANDOFF_STATE_ACCEPTED,
    HandoffState.MOVING: pb.HANDOFF_STATE_MOVING,
    HandoffState.LANDED: pb.HANDOFF_STATE_LANDED,
    HandoffState.COMMITTED: pb.HANDOFF_STATE_COMMITTED,
    HandoffState.ABORTED: pb.HANDOFF_STATE_ABORTED,
}
_STATE_FROM_WIRE: Final[Mapping[int, HandoffState | None]] = {
    wire: state for state, wire in STATE_TO_WIRE.items()
}


def state_from_wire(state: int) -> HandoffState | None:
    """What a source says of a hand-off; None when it knows nothing of it, or says what we do not know."""
    return _STATE_FROM_WIRE.get(state)


def peer_from_wire(address: pb.WorkerAddress) -> PeerId:
    """The life of a worker that an address names."""
    return PeerId(WorkerId(address.worker_id), Incarnation(address.incarnation))


def key_from_wire(ref: pb.HandoffRef) -> HandoffKey:
    """The hand-off that a reference names."""
    return HandoffKey(LegId(ref.leg_id), ref.epoch)


def heads_to_wire(heads: HeadRange | None) -> pb.HeadRange | None:
    """The message for a rank's heads; None, which leaves the field out, for all of them."""
    return None if heads is None else pb.HeadRange(first=heads.first, count=heads.count, total=heads.total)


def exchange_to_wire(exchange: FrameExchange | None) -> pb.FrameExchange | None:
    """The message; None, which leaves the field out, where KV was moved."""
    if exchange is None:
        return None
    return pb.FrameExchange(member=exchange.member, first_block=exchange.first_block, frames=exchange.frames)


def exchange_from_wire(request: pb.CommitRequest) -> FrameExchange | None:
    """What a commit offers for the blocks; nothing in it is checked yet."""
    if not request.HasField("exchange"):
        return None
    found = request.exchange
    return FrameExchange(found.member, found.first_block, tuple(map(BlockId, found.frames)))


def transfer_from_wire(request: pb.PullRequest) -> Transfer:
    """The transfer that a pull asks for."""
    part = BlockRange(request.first_block, request.num_blocks, request.first_layer, request.num_layers)
    return Transfer(key_from_wire(request.handoff), request.transfer_number, part)


def describe_piece(piece: Piece, response: pb.PullResponse) -> None:
    """Fills in what was granted."""
    part = piece.block_range
    response.source_blocks.extend(piece.blocks)
    response.length_bytes = piece.length_bytes
    response.first_block, response.first_layer = part.first_block, part.first_layer
    response.num_layers = part.num_layers
    response.part_offset, response.part_bytes = piece.part_offset, piece.part_bytes


def grant_from_wire(asked: Transfer, answer: pb.PullResponse, asked_s: float) -> PullGrant:
    """The grant of a pull that was sent at `asked_s` on our clock; a lease that is no number has ended.

    Nothing else in it is checked yet.
    """
    lease_s = answer.lease_s if math.isfinite(answer.lease_s) else 0.0
    blocks = tuple(BlockId(block) for block in answer.source_blocks)
    part = BlockRange(answer.first_block, len(blocks), answer.first_layer, answer.num_layers)
    return PullGrant(
        Transfer(asked.key, asked.number, part),
        blocks,
        answer.part_offset,
        answer.part_bytes,
        answer.length_bytes,
        asked_s + lease_s,
    )
