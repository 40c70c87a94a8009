"""Edge: HandoffService over a HandoffSource: messages in, refusals with a named fault out."""

from typing import Any, Final

import grpc
import grpc.aio

from kvtransfer.contract import BlockRange, HandoffKey, PeerId, Transfer
from kvtransfer.handoff import HandoffState
from kvtransfer.source import HandoffSource, PullAsk
from tandem.errors import ProtocolError, TransferError
from tandem.ids import Incarnation, LegId, WorkerId
from tandem.v1 import worker_pb2 as pb
from tandem.v1.worker_pb2_grpc import HandoffServiceServicer
from tandem.wire import address_to_wire

STATE_TO_WIRE: Final = {
    None: pb.HANDOFF_STATE_UNSPECIFIED,
    HandoffState.OFFERED: pb.HANDOFF_STATE_OFFERED,
    HandoffState.ACCEPTED: pb.HANDOFF_STATE_ACCEPTED,
    HandoffState.MOVING: pb.HANDOFF_STATE_MOVING,
    HandoffState.LANDED: pb.HANDOFF_STATE_LANDED,
    HandoffState.COMMITTED: pb.HANDOFF_STATE_COMMITTED,
    HandoffState.ABORTED: pb.HANDOFF_STATE_ABORTED,
}

_Context = grpc.aio.ServicerContext[Any, Any]


class HandoffServicer(HandoffServiceServicer):
    """Answers sinks. A refused pull is an answer; a refused Connect is FAILED_PRECONDITION.

    Both say "fault: sentence", where fault is a value of TransferFault.
    """

    def __init__(self, source: HandoffSource) -> None:
        self._source = source

    async def Connect(self, request: pb.ConnectRequest, context: _Context) -> pb.ConnectResponse:
        """Agrees on transports."""
        sink = request.sink
        try:
            endpoints = self._source.connect(_peer(sink), sink.digest, request.transports, request.host_id)
        except TransferError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, _named(error))
        return pb.ConnectResponse(
            source=address_to_wire(self._source.me),
            endpoints=[
                pb.TransportEndpoint(transport=found.transport, address=found.address, ticket=found.ticket)
                for found in endpoints
            ],
            block_bytes=self._source.block_bytes,
        )

    async def Pull(self, request: pb.PullRequest, context: _Context) -> pb.PullResponse:
        """Grants a lease or says why not."""
        sink = request.handoff.sink
        part = BlockRange(request.first_block, request.num_blocks, request.first_layer, request.num_layers)
        transfer = Transfer(_key(request.handoff), request.transfer_number, part)
        try:
            answer = await self._source.pull(PullAsk(_peer(sink), sink.digest, request.transport, transfer))
        except TransferError as error:
            return pb.PullResponse(state=pb.HANDOFF_STATE_UNSPECIFIED, refusal=_named(error))
        return pb.PullResponse(
            state=pb.HANDOFF_STATE_ACCEPTED,
            lease_s=answer.lease_s,
            source_blocks=answer.source_blocks,
            checksums=answer.checksums,
            length_bytes=answer.length_bytes,
        )

    async def Commit(self, request: pb.HandoffRef, context: _Context) -> pb.HandoffStatus:
        """Frees the blocks."""
        try:
            state = self._source.commit(_key(request), _peer(request.sink))
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"refused: {error}")
        return pb.HandoffStatus(state=STATE_TO_WIRE[state])

    async def Abort(self, request: pb.HandoffRef, context: _Context) -> pb.HandoffStatus:
        """Frees the blocks of a hand-off that its sink gave up."""
        try:
            state = self._source.abort(_key(request), _peer(request.sink))
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"refused: {error}")
        return pb.HandoffStatus(state=STATE_TO_WIRE[state])

    async def Query(self, request: pb.HandoffRef, context: _Context) -> pb.HandoffStatus:
        """Says where a hand-off stands."""
        return pb.HandoffStatus(state=STATE_TO_WIRE[self._source.query(_key(request))])


def _peer(address: pb.WorkerAddress) -> PeerId:
    return PeerId(WorkerId(address.worker_id), Incarnation(address.incarnation))


def _key(ref: pb.HandoffRef) -> HandoffKey:
    return HandoffKey(LegId(ref.leg_id), ref.epoch)


def _named(error: TransferError) -> str:
    return f"{error.fault.value}: {error}"
