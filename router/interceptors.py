"""Edge: what every gRPC call goes through: errors become rich statuses, outcomes are counted."""

import math
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from prometheus_client import Counter

from tandem.errors import InvalidRequest, NotReady, Overloaded, TandemError

log = structlog.get_logger(__name__)

NOT_READY_RETRY_S = 1.0
"""A worker that comes back needs a few seconds; asking each second costs nothing."""

OUR_METHODS = "/tandem."
INTERNAL_TEXT = "Internal error; the router's log says more."

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Context = grpc.aio.ServicerContext[Any, Any]


def status_of(error: TandemError) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo, and with BadRequest or RetryInfo where they say more."""
    status = status_pb2.Status(code=grpc.StatusCode[error.grpc_code].value[0], message=str(error))
    status.details.append(_packed(error_details_pb2.ErrorInfo(reason=type(error).__name__, domain="tandem")))
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        status.details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if isinstance(error, Overloaded | NotReady):
        wait_s = error.retry_after_s if isinstance(error, Overloaded) else NOT_READY_RETRY_S
        delay = Duration(seconds=math.ceil(wait_s))
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Translates errors once, lets no traceback out, and counts calls by status code.

    Our handlers are coroutines (streams write to the context), so that a cancelled call ends at once.
    """

    def __init__(self, calls: Counter) -> None:
        self._calls = calls
        self._ok = calls.labels("grpc", "OK")
        self._handlers: dict[str, Any] = {}

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Any:
        """Wraps our own methods, each once; health and reflection pass."""
        known = self._handlers.get(details.method)
        if known is not None:
            return known
        handler = await continuation(details)
        if handler is None or not details.method.startswith(OUR_METHODS):
            return handler
        streams = handler.response_streaming
        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        inner = handler.unary_stream if streams else handler.unary_unary
        made = make(self._wrapped(inner), handler.request_deserializer, handler.response_serializer)
        self._handlers[details.method] = made
        return made

    def _wrapped(self, inner: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Any]:
        async def call(request: Any, context: Context) -> Any:
            try:
                response = await inner(request, context)
            except TandemError as error:
                self._calls.labels("grpc", error.grpc_code).inc()
                await context.abort_with_status(rpc_status.to_status(status_of(error)))
            except grpc.aio.AbortError:
                raise
            except Exception:
                log.exception("unexpected error in a call")
                self._calls.labels("grpc", "INTERNAL").inc()
                await context.abort(grpc.StatusCode.INTERNAL, INTERNAL_TEXT)
            self._ok.inc()
            return response

        return call
