"""Edge: what a load can be driven against: the gRPC API or the OpenAI HTTP API of a running cluster."""

import json
import os
from collections.abc import AsyncGenerator
from typing import Protocol

import httpx

from benchmarks.workload import PlannedRequest
from tandem.client import AsyncTandemClient, GenerateOptions
from tandem.errors import DeadlineExceeded, InvalidRequest, Overloaded, TandemError
from tandem.generation import SamplingOptions, TokenPrompt

MAX_CONNECTIONS = 4096


class Target(Protocol):
    """Something that answers requests."""

    def tokens(self, request: PlannedRequest, timeout_s: float) -> AsyncGenerator[int, None]:
        """Yields the number of new tokens at each arrival.

        Raises Overloaded when refused, DeadlineExceeded, or another TandemError when it failed.
        """
        ...

    async def close(self) -> None:
        """Ends all connections."""
        ...


class GrpcTarget:
    """Over InferenceService.Generate; streams are not resumed, since a load counts what breaks."""

    def __init__(self, address: str) -> None:
        self._client = AsyncTandemClient(address, resume_window_s=-1.0)

    async def tokens(self, request: PlannedRequest, timeout_s: float) -> AsyncGenerator[int, None]:
        """See Target."""
        sampling = SamplingOptions(
            temperature=0.0,
            max_tokens=request.output_tokens,
            ignore_eos=True,
            min_tokens=request.output_tokens,
        )
        options = GenerateOptions(sampling=sampling, slo_class=request.slo_class, timeout_s=timeout_s)
        async for update in self._client.generate(TokenPrompt(request.token_ids), options):
            new = sum(len(delta.token_ids) for delta in update.deltas)
            if new:
                yield new

    async def close(self) -> None:
        """See Target."""
        await self._client.close()


class HttpTarget:
    """Over POST /v1/completions with server-sent events; the last event's usage corrects the count.

    An event carries text, not tokens: it counts as one arrival of one token, and what the usage says beyond
    that is added to the last arrival. So gaps are those a reader of the text sees.
    """

    def __init__(self, address: str, model: str) -> None:
        """Raises InvalidRequest for what is no address."""
        key = os.environ.get("TANDEM_API_KEY")
        self._model = model
        try:
            base = httpx.URL(f"http://{address}")
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"{address!r} is no HOST:PORT: {error}.", "--http-address") from error
        self._client = httpx.AsyncClient(
            base_url=base,
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
        )

    async def tokens(self, request: PlannedRequest, timeout_s: float) -> AsyncGenerator[int, None]:
        """See Target."""
        body = {
            "model": self._model,
            "prompt": list(request.token_ids),
            "max_tokens": request.output_tokens,
            "min_tokens": request.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "slo_class": request.slo_class,
        }
        counted = 0
        try:
            async with self._client.stream("POST", "/v1/completions", json=body, timeout=timeout_s) as answer:
                await _check(answer)
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    new = _new_tokens(event, counted)
                    if new:
                        counted += new
                        yield new
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"No answer within {timeout_s:g} s.") from error
        except httpx.HTTPError as error:
            raise TandemError(f"HTTP failed: {error}") from error

    async def close(self) -> None:
        """See Target."""
        await self._client.aclose()


def _new_tokens(event: dict[str, object], counted: int) -> int:
    usage = event.get("usage")
    if isinstance(usage, dict):
        return max(0, int(usage.get("completion_tokens", 0)) - counted)
    if "error" in event:
        raise TandemError(f"The stream ended with an error: {event['error']}")
    choices = event.get("choices")
    return 1 if isinstance(choices, list) and choices and choices[0].get("text") else 0


async def _check(answer: httpx.Response) -> None:
    if answer.status_code == httpx.codes.OK:
        return
    text = (await answer.aread()).decode(errors="replace")[:500]
    if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
        raise Overloaded(text, float(answer.headers.get("retry-after", 1)))
    if answer.status_code == httpx.codes.GATEWAY_TIMEOUT:
        raise DeadlineExceeded(text)
    raise TandemError(f"HTTP {answer.status_code}: {text}")
