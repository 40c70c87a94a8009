"""Edge: what every HTTP request goes through (key check, counting); answers that end with their reader."""

import asyncio
import hmac
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import cast

import orjson
from prometheus_client import Counter
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.openai_answer import error_json
from router.validation import REQUEST_ID

SEND_TIMEOUT_S = 60.0
"""A reader that takes nothing for so long is cut off."""

GUARDED = "/v1/"
REQUEST_ID_KEY = "tandem.request_id"
CLIENT_LEFT = 499
BROKEN = 500


class EdgeMiddleware:
    """Refuses calls to the API without the key, gives every call an id, and counts calls by status."""

    def __init__(self, application: ASGIApp, api_key: str | None, calls: Counter) -> None:
        self._application = application
        self._expected = None if api_key is None else api_key.encode()
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it."""
        if scope["type"] != "http":
            return
        scope[REQUEST_ID_KEY] = _inbound_request_id(scope) or uuid.uuid4().hex
        watched = _WatchedAnswer(send, scope[REQUEST_ID_KEY])
        status = BROKEN
        try:
            if self._refused(scope):
                await _refusal()(scope, receive, watched.send)
            else:
                await self._application(scope, receive, watched.send)
            status = watched.status
        finally:
            self._calls.labels("http", str(status)).inc()

    def _refused(self, scope: Scope) -> bool:
        if self._expected is None or not scope["path"].startswith(GUARDED):
            return False
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._expected)


class _WatchedAnswer:
    """Passes an answer on with the call's id in its head, and knows how it ended."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._id_header = (b"x-request-id", request_id.encode())
        self._begun_as: int | None = None
        self._complete = False

    @property
    def status(self) -> int:
        """The status that went out; 499 when the answer did not reach its end, as its reader left."""
        return self._begun_as if self._begun_as is not None and self._complete else CLIENT_LEFT

    async def send(self, message: Message) -> None:
        """The ASGI callable that applications are given."""
        if message["type"] == "http.response.start":
            self._begun_as = message["status"]
            message = {**message, "headers": [*message["headers"], self._id_header]}
        elif message["type"] == "http.response.body":
            self._complete = not message.get("more_body", False)
        await self._send(message)


def request_id_of(scope: Scope) -> str:
    """The id of a call that EdgeMiddleware has let in; it goes back as x-request-id."""
    return str(scope[REQUEST_ID_KEY])


def _inbound_request_id(scope: Scope) -> str | None:
    """The client's X-Request-Id; None unless it is a valid request id."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else None


def _refusal() -> Response:
    body = error_json(
        401, "Missing or wrong API key; send it as `Authorization: Bearer KEY`.", code="invalid_api_key"
    )
    return Response(orjson.dumps(body), 401, {"www-authenticate": "Bearer"}, media_type="application/json")


class UntilDisconnected(Response):
    """Sends pieces as they come; when the reader leaves, the source of the pieces is closed at once.

    The status goes out with the first piece, so that an error before it gets a status of its own.
    """

    def __init__(self, pieces: AsyncIterator[bytes], media_type: str) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs to the end of the pieces or of the connection, whichever comes first."""
        sending = asyncio.create_task(self._send_pieces(send))
        watching = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)

    async def _send_pieces(self, send: Send) -> None:
        begun = False
        # An async generator in all our uses; closing it is what cancels the request.
        async with aclosing(cast("AsyncGenerator[bytes]", self._pieces)) as pieces:
            async for piece in pieces:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    if not begun:
                        begun = True
                        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                        await send(start)
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
