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

SEND_TIMEOUT_S = 60.0
"""A reader that takes nothing for so long is cut off."""

GUARDED = "/v1/"


class EdgeMiddleware:
    """Refuses calls to the API without the key, and counts answers by status."""

    def __init__(self, application: ASGIApp, api_key: str | None, calls: Counter) -> None:
        self._application = application
        self._expected = None if api_key is None else api_key.encode()
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it."""
        if scope["type"] != "http":
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._calls.labels("http", str(message["status"])).inc()
                if all(name != b"x-request-id" for name, _ in message["headers"]):
                    own = (b"x-request-id", uuid.uuid4().hex.encode())
                    message = {**message, "headers": [*message["headers"], own]}
            await send(message)

        if self._refused(scope):
            body = error_json(401, "Missing or wrong API key.", code="invalid_api_key")
            headers = {"www-authenticate": "Bearer"}
            response = Response(orjson.dumps(body), 401, headers, media_type="application/json")
            await response(scope, receive, counting)
        else:
            await self._application(scope, receive, counting)

    def _refused(self, scope: Scope) -> bool:
        if self._expected is None or not scope["path"].startswith(GUARDED):
            return False
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._expected)


class UntilDisconnected(Response):
    """Sends pieces as they come; when the reader leaves, the source of the pieces is closed at once.

    The status goes out with the first piece, so that an error before it gets a status of its own.
    """

    def __init__(self, pieces: AsyncIterator[bytes], media_type: str, request_id: str) -> None:
        headers = {"cache-control": "no-cache", "x-request-id": request_id}
        super().__init__(media_type=media_type, headers=headers)
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
