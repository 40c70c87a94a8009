"""Edge: how every gRPC server and channel of Tandem is opened: limits, keep-alive, and the token check."""

import hmac
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tandem.errors import InvalidRequest, TandemError, Unauthenticated

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""Largest message taken on any port."""

CLUSTER_TOKEN_ENV = "TANDEM_CLUSTER_TOKEN"  # noqa: S105 - the variable's name, not its value
"""Environment variable with the token that routers and workers prove to each other."""

API_KEY_ENV = "TANDEM_API_KEY"
"""Environment variable with the key that clients must send; unset means an open front door."""

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
)

_OPEN_METHODS = ("/grpc.health.", "/grpc.reflection.")

ERROR_DOMAIN = "tandem"
"""Domain of the reasons in google.rpc.ErrorInfo, which are the names of tandem.errors."""

_REFUSAL = Unauthenticated(
    "The token is missing or wrong; send it as the metadata `authorization: Bearer TOKEN`."
)


def status_of(error: TandemError) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo, and with BadRequest or RetryInfo where they say more."""
    status = status_pb2.Status(code=grpc.StatusCode[error.grpc_code].value[0], message=str(error))
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=ERROR_DOMAIN)
    status.details.append(_packed(info))
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        status.details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        delay = Duration(seconds=math.ceil(error.retry_after_s))
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


class BearerTokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without `authorization: Bearer <token>`; health and reflection stay open.

    `on_refused` is told of each refusal, as these reach no other interceptor.
    """

    def __init__(self, token: str, on_refused: Callable[[], None] | None = None) -> None:
        self._expected = token.encode()
        self._on_refused = on_refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """Passes the call on, or answers UNAUTHENTICATED."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(_OPEN_METHODS):
            return handler
        given = dict(details.invocation_metadata).get("authorization", "")
        given_bytes = given if isinstance(given, bytes) else given.encode()
        scheme, _, key = given_bytes.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._expected):
            return handler
        if self._on_refused is not None:
            self._on_refused()
        return _refusing(handler)


def _refusing(handler: Any) -> Any:
    """A handler of the same kind that answers UNAUTHENTICATED."""

    async def unary(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort_with_status(rpc_status.to_status(status_of(_REFUSAL)))

    async def stream(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort_with_status(rpc_status.to_status(status_of(_REFUSAL)))
        # The unreachable yield makes this a generator, which a streaming handler must be.
        yield  # type: ignore[unreachable]

    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[(handler.request_streaming, handler.response_streaming)]
    return make(
        stream if handler.response_streaming else unary,
        handler.request_deserializer,
        handler.response_serializer,
    )


def server(
    token: str | None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    on_refused: Callable[[], None] | None = None,
) -> grpc.aio.Server:
    """A server with our limits; with a token, every call but health and reflection must prove it.

    `on_refused` is told of each call that does not.
    """
    guards = [*interceptors] if token is None else [BearerTokenInterceptor(token, on_refused), *interceptors]
    return grpc.aio.server(interceptors=guards, options=_OPTIONS)


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Opens a port of a server; returns it (0 lets the system choose). Raises OSError when it is taken."""
    try:
        return server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"gRPC port {host}:{port} cannot be bound.") from error


def channel(address: str) -> grpc.aio.Channel:
    """A channel with our limits. TCP_NODELAY is gRPC's own default."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata that proves a token; empty without one."""
    return () if token is None else (("authorization", f"Bearer {token}"),)
