"""Edge: what every gRPC call goes through: errors become rich statuses, outcomes are counted."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_status import rpc_status
from prometheus_client import Counter

from tandem.errors import TandemError
from tandem.grpc_edge import status_of

log = structlog.get_logger(__name__)

OUR_METHODS = "/tandem."
INTERNAL_TEXT = "Internal error; the router's log says more."

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Context = grpc.aio.ServicerContext[Any, Any]


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
            except asyncio.CancelledError:
                self._calls.labels("grpc", _why_ended(context)).inc()
                raise
            except grpc.aio.AbortError:
                raise
            except Exception:
                log.exception("unexpected error in a call")
                self._calls.labels("grpc", "INTERNAL").inc()
                await context.abort_with_status(rpc_status.to_status(status_of(TandemError(INTERNAL_TEXT))))
            self._ok.inc()
            return response

        return call


def _why_ended(context: Context) -> str:
    """Why gRPC cancelled a call: its deadline passed, or else its client left."""
    left_s = context.time_remaining()
    return "CANCELLED" if left_s is None or left_s > 0 else "DEADLINE_EXCEEDED"
