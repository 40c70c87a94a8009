"""Edge: HandoffService as a sink calls it; every call is bounded and fails as a TransferError."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, TypeVar

import grpc
import grpc.aio

from kvtransfer.contract import HandoffKey, HeadRange, PullGrant, Transfer
from kvtransfer.handoffs.offers import FrameExchange
from kvtransfer.handoffs.wire import exchange_to_wire, grant_from_wire, heads_to_wire, state_from_wire
from kvtransfer.handoffs.words import HandoffState
from tandem import grpc_edge
from tandem.errors import TransferError, TransferFault
from tandem.v1 import worker_pb2 as pb
from tandem.v1.worker_pb2_grpc import HandoffServiceStub
from tandem.wire import address_to_wire
from tandem.worker import WorkerRecord

_FAULTS: Final = {fault.value: fault for fault in TransferFault}

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, slots=True)
class PullTerms:
    """How a transfer should go; `priority` and `remaining_s` are the request's."""

    transfer: Transfer
    transport: str
    priority: int
    remaining_s: float


@dataclass(frozen=True, slots=True)
class CommitStatus:
    """Where the source stands (None: it does not know the hand-off), and what it does not accept."""

    state: HandoffState | None
    mismatched: tuple[int, ...]


class HandoffClient:
    """The channel to one source."""

    def __init__(self, me: WorkerRecord, source: WorkerRecord, token: str | None) -> None:
        self._me = address_to_wire(me)
        self._source = source
        self._channel = grpc_edge.channel(source.address)
        self._stub = HandoffServiceStub(self._channel)
        self._metadata = grpc_edge.bearer(token)

    async def connect(
        self,
        transports: Sequence[str],
        host_id: str,
        timeout_s: float,
        checksums: Sequence[str] = (),
        heads: HeadRange | None = None,
    ) -> pb.ConnectResponse:
        """Agrees on transports. Raises TransferError, also when another incarnation or model answers."""
        request = pb.ConnectRequest(
            sink=self._me,
            transports=transports,
            host_id=host_id,
            checksums=checksums,
            heads=heads_to_wire(heads),
        )
        answer = await _called(
            "Connect", lambda: self._stub.Connect(request, timeout=timeout_s, metadata=self._metadata)
        )
        found = answer.source
        if (found.worker_id, found.incarnation) != (self._source.worker_id, self._source.incarnation):
            message = f"At {self._source.address} now lives {found.worker_id} in life {found.incarnation}."
            raise TransferError(TransferFault.DISCONNECTED, message)
        if found.digest != self._me.digest:
            message = f"The source has digest {found.digest}, this sink {self._me.digest}."
            raise TransferError(TransferFault.DIGEST, message)
        return answer

    async def pull(self, terms: PullTerms, asked_s: float, timeout_s: float) -> PullGrant | None:
        """The grant, its lease counted from `asked_s`, when the request was sent (our clock).

        None when nothing is ready yet. Raises TransferError with the source's fault when it refused.
        """
        answer = await self._pull(terms, 0.0, timeout_s)
        return None if answer.not_ready else grant_from_wire(terms.transfer, answer, asked_s)

    async def wait(self, terms: PullTerms, wait_s: float, timeout_s: float) -> bool:
        """Whether something of the range is ready, waiting for it at the source; keeps the offer alive.

        Raises TransferError with the source's fault when it refused.
        """
        return not (await self._pull(terms, wait_s, timeout_s)).not_ready

    async def _pull(self, terms: PullTerms, wait_s: float, timeout_s: float) -> pb.PullResponse:
        transfer = terms.transfer
        part = transfer.block_range
        request = pb.PullRequest(
            handoff=self._ref(transfer.key),
            transport=terms.transport,
            transfer_number=transfer.number,
            first_block=part.first_block,
            num_blocks=part.num_blocks,
            first_layer=part.first_layer,
            num_layers=part.num_layers,
            priority=terms.priority,
            remaining_s=terms.remaining_s,
            wait_s=wait_s,
        )
        answer = await _called(
            "Pull", lambda: self._stub.Pull(request, timeout=timeout_s, metadata=self._metadata)
        )
        if answer.refusal or answer.state not in (pb.HANDOFF_STATE_ACCEPTED, pb.HANDOFF_STATE_MOVING):
            _refused(answer.refusal)
        return answer

    async def commit(
        self,
        key: HandoffKey,
        number: int,
        landed: Mapping[int, int],
        timeout_s: float,
        exchange: FrameExchange | None = None,
    ) -> CommitStatus:
        """What the source says of our checksums by transfer number; `number` is that of our last transfer.

        `exchange` is for blocks that are adopted, of which there are no checksums.
        """
        request = pb.CommitRequest(
            handoff=self._ref(key),
            landed=[
                pb.LandedTransfer(transfer_number=transfer, checksum=checksum)
                for transfer, checksum in landed.items()
            ],
            last_number=number,
            exchange=exchange_to_wire(exchange),
        )
        answer = await _called(
            "Commit", lambda: self._stub.Commit(request, timeout=timeout_s, metadata=self._metadata)
        )
        return CommitStatus(state_from_wire(answer.state), tuple(answer.mismatched))

    async def abort(self, key: HandoffKey, timeout_s: float) -> HandoffState | None:
        """The source's state after it was told that we gave up."""
        answer = await _called(
            "Abort", lambda: self._stub.Abort(self._ref(key), timeout=timeout_s, metadata=self._metadata)
        )
        return state_from_wire(answer.state)

    async def query(self, key: HandoffKey, timeout_s: float) -> HandoffState | None:
        """The source's state."""
        answer = await _called(
            "Query", lambda: self._stub.Query(self._ref(key), timeout=timeout_s, metadata=self._metadata)
        )
        return state_from_wire(answer.state)

    async def close(self) -> None:
        """Ends the channel and the calls on it."""
        await self._channel.close()

    def _ref(self, key: HandoffKey) -> pb.HandoffRef:
        return pb.HandoffRef(leg_id=key.leg_id, epoch=key.epoch, sink=self._me)


async def _called(name: str, call: Callable[[], Awaitable[AnswerT]]) -> AnswerT:
    """The answer, or what went wrong as a TransferError; `call` itself raises on a closed channel."""
    try:
        return await call()
    except grpc.aio.AioRpcError as error:
        details = error.details() or ""
        if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
            _refused(details)
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TransferError(TransferFault.TIMEOUT, f"{name} was not answered in time.") from error
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            raise TransferError(TransferFault.DISCONNECTED, f"{name}: the source is gone.") from error
        message = f"{name} failed with {error.code().name}: {details}"
        raise TransferError(TransferFault.REFUSED, message) from error
    except asyncio.CancelledError as error:
        # A call that ends because its channel was closed looks like a cancelled task; only one of them is.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise TransferError(TransferFault.DISCONNECTED, f"{name}: the channel was closed.") from error
    except grpc.aio.UsageError as error:
        raise TransferError(TransferFault.DISCONNECTED, f"{name}: the channel is closed.") from error


def _refused(reason: str) -> NoReturn:
    """Raises what the source named; an unnamed reason is REFUSED."""
    name, _, sentence = reason.partition(": ")
    fault = _FAULTS.get(name)
    if fault is None:
        raise TransferError(TransferFault.REFUSED, reason or "The source refused without a reason.")
    raise TransferError(fault, sentence)
