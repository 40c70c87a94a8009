"""Edge: HandoffService over a HandoffSource: messages in, refusals with a named fault out."""

from typing import Any, NoReturn

import grpc
import grpc.aio

from kvtransfer.contract import HeadRange
from kvtransfer.handoffs.offers import PullAsk
from kvtransfer.handoffs.pairing import Introduction
from kvtransfer.handoffs.source import HandoffSource
from kvtransfer.handoffs.wire import (
    STATE_TO_WIRE,
    describe_piece,
    exchange_from_wire,
    heads_to_wire,
    key_from_wire,
    peer_from_wire,
    transfer_from_wire,
)
from tandem.errors import ProtocolError, TransferError, TransferFault
from tandem.v1 import worker_pb2 as pb
from tandem.v1.worker_pb2_grpc import HandoffServiceServicer
from tandem.wire import address_to_wire

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
        heads = HeadRange(request.heads.first, request.heads.count, request.heads.total)
        who = Introduction(
            *(peer_from_wire(sink), sink.digest, tuple(request.transports), request.host_id),
            *(tuple(request.checksums), heads if request.HasField("heads") else None),
        )
        try:
            agreed = self._source.connect(who)
        except TransferError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, _named(error))
        return pb.ConnectResponse(
            source=address_to_wire(self._source.me),
            endpoints=[
                pb.TransportEndpoint(transport=found.transport, address=found.address, ticket=found.ticket)
                for found in agreed.endpoints
            ],
            block_bytes=self._source.block_bytes,
            checksum=agreed.checksum,
            heads=heads_to_wire(self._source.heads),
        )

    async def Pull(self, request: pb.PullRequest, context: _Context) -> pb.PullResponse:
        """Grants a lease, says that nothing is ready yet, or says why not."""
        sink = request.handoff.sink
        transfer = transfer_from_wire(request)
        ask = PullAsk(peer_from_wire(sink), sink.digest, request.transport, transfer, request.wait_s)
        try:
            answer = await self._source.pull(ask)
        except TransferError as error:
            return pb.PullResponse(state=pb.HANDOFF_STATE_UNSPECIFIED, refusal=_named(error))
        response = pb.PullResponse(
            state=pb.HANDOFF_STATE_ACCEPTED, lease_s=answer.lease_s, not_ready=not answer.ready
        )
        if answer.piece is not None:
            describe_piece(answer.piece, response)
        return response

    async def Commit(self, request: pb.CommitRequest, context: _Context) -> pb.HandoffStatus:
        """Compares checksums and frees the blocks."""
        landed = {found.transfer_number: found.checksum for found in request.landed}
        ref = request.handoff
        try:
            answer = await self._source.commit(
                *(key_from_wire(ref), peer_from_wire(ref.sink), request.last_number, landed),
                exchange_from_wire(request),
            )
        except ProtocolError as error:
            await self._refuse(context, error)
        except TransferError as error:
            self._source.count_refusal(error.fault)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, _named(error))
        return pb.HandoffStatus(state=STATE_TO_WIRE[answer.state], mismatched=answer.mismatched)

    async def Abort(self, request: pb.HandoffRef, context: _Context) -> pb.HandoffStatus:
        """Frees the blocks of a hand-off that its sink gave up."""
        try:
            state = self._source.abort(key_from_wire(request), peer_from_wire(request.sink))
        except ProtocolError as error:
            await self._refuse(context, error)
        return pb.HandoffStatus(state=STATE_TO_WIRE[state])

    async def Query(self, request: pb.HandoffRef, context: _Context) -> pb.HandoffStatus:
        """Says where a hand-off stands."""
        return pb.HandoffStatus(state=STATE_TO_WIRE[self._source.query(key_from_wire(request))])

    async def _refuse(self, context: _Context, error: ProtocolError) -> NoReturn:
        """What a sink asks for out of turn is counted as what it asks for wrongly."""
        self._source.count_refusal(TransferFault.REFUSED)
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{TransferFault.REFUSED.value}: {error}")


def _named(error: TransferError) -> str:
    return f"{error.fault.value}: {error}"
