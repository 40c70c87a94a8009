"""Edge: the Python client, asynchronous and synchronous: a stream that survives a broken connection."""

import asyncio
import os
import random
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tandem import errors, grpc_edge
from tandem.generation import (
    Prompt,
    SamplingOptions,
    Update,
    prompt_to_wire,
    sampling_options_to_wire,
    update_from_wire,
)
from tandem.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2_grpc
from tandem.v1 import inference_pb2 as pb

DEFAULT_ADDRESS = "localhost:50051"

CONNECT_TIMEOUT_S = 3.0
CALL_TIMEOUT_S = 5.0
DEFAULT_REQUEST_TIMEOUT_S = 600.0
FIRST_RETRY_S = 0.1
LAST_RETRY_S = 1.0

_SIMPLE_ERRORS: dict[grpc.StatusCode, type[errors.TandemError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.UnknownModel,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.ALREADY_EXISTS: errors.DuplicateRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: errors.NotReady,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
}


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """How a request is treated. `timeout_s` bounds it altogether, reconnections included."""

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    slo_class: str = ""
    priority: int = 0
    model: str = ""
    request_id: str = ""
    timeout_s: float = DEFAULT_REQUEST_TIMEOUT_S


class AsyncTandemClient:
    """A connection to a router; use as `async with`.

    `api_key` defaults to the environment variable TANDEM_API_KEY. A stream that breaks with UNAVAILABLE is
    resumed where it broke, for `resume_window_s` at most since the last news.
    Methods raise the errors of tandem.errors; nothing of gRPC comes through.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, api_key: str | None = None, resume_window_s: float = 30.0
    ) -> None:
        self.address = address
        self._metadata = grpc_edge.bearer(api_key or os.environ.get(grpc_edge.API_KEY_ENV))
        self._resume_window_s = resume_window_s
        self._channel = grpc_edge.channel(address)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and all its streams; idempotent."""
        await self._channel.close()

    async def generate(
        self, prompt: Prompt, options: GenerateOptions | None = None
    ) -> AsyncGenerator[Update, None]:
        """Streams the answer, each token once and in order; closing the generator cancels the request."""
        chosen = options or GenerateOptions()
        request = _request(prompt, chosen)
        progress = _Progress()
        deadline_s = time.monotonic() + chosen.timeout_s
        await self._connect()
        while True:
            call = self._inference.Generate(
                request, metadata=self._metadata, timeout=max(0.001, deadline_s - time.monotonic())
            )
            try:
                async for message in call:
                    update = progress.accept(message)
                    if update is not None:
                        yield update
                return
            except grpc.aio.AioRpcError as error:
                pause_s = progress.pause_before_retry_s(self._resume_window_s)
                if error.code() is not grpc.StatusCode.UNAVAILABLE or pause_s is None:
                    raise _error_of(error, self.address) from error
                await asyncio.sleep(pause_s)
                request = progress.resume_of(request)
            finally:
                call.cancel()

    async def models(self) -> tuple[pb.Model, ...]:
        """The models that the router serves."""
        try:
            answer = await self._inference.ListModels(
                pb.ListModelsRequest(), metadata=self._metadata, timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, self.address) from error
        return tuple(answer.models)

    async def status(self) -> cluster_pb2.StatusResponse:
        """Workers, load and goodput as the router sees them."""
        try:
            return await self._cluster.Status(
                cluster_pb2.StatusRequest(), metadata=self._metadata, timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, self.address) from error

    async def load(self, after: int = 0) -> cluster_pb2.LoadResponse:
        """What came and how it ended since the router's start; lengths of requests that ended after one."""
        try:
            return await self._cluster.Load(
                cluster_pb2.LoadRequest(after=after), metadata=self._metadata, timeout=CALL_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise _error_of(error, self.address) from error

    async def _connect(self) -> None:
        """Fails at once when nobody listens: that is no interruption of a request."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                state = self._channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.READY:
                    await self._channel.wait_for_state_change(state)
                    state = self._channel.get_state(try_to_connect=True)
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise errors.NotReady(_nobody_listens(self.address))
        except TimeoutError as error:
            raise errors.NotReady(_nobody_listens(self.address)) from error


class TandemClient:
    """The same, for programs without asyncio; use as `with`, from one thread."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, api_key: str | None = None, resume_window_s: float = 30.0
    ) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(_open(address, api_key, resume_window_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._runner.run(self._client.close())
        self._runner.close()

    def generate(self, prompt: Prompt, options: GenerateOptions | None = None) -> Generator[Update]:
        """Streams the answer; closing the generator cancels the request."""
        stream = self._client.generate(prompt, options)
        try:
            while (update := self._runner.run(_next(stream))) is not None:
                yield update
        finally:
            self._runner.run(stream.aclose())

    def models(self) -> tuple[pb.Model, ...]:
        """The models that the router serves."""
        return self._runner.run(self._client.models())

    def status(self) -> cluster_pb2.StatusResponse:
        """Workers, load and goodput as the router sees them."""
        return self._runner.run(self._client.status())


class _Progress:
    """What a request's client has so far: enough to ask for the rest, and to drop what comes twice."""

    def __init__(self) -> None:
        self._tokens: dict[int, list[int]] = {}
        self._finished: set[int] = set()
        self._last_news_s = time.monotonic()
        self._pause_s = FIRST_RETRY_S

    def accept(self, message: pb.GenerateResponse) -> Update | None:
        """The news in a response, without chunks that came before; None when nothing is left."""
        self._last_news_s, self._pause_s = time.monotonic(), FIRST_RETRY_S
        update = update_from_wire(message)
        fresh = []
        for delta in update.deltas:
            tokens = self._tokens.setdefault(delta.sample_index, [])
            if delta.sample_index in self._finished or delta.first_index < len(tokens):
                continue
            if delta.first_index > len(tokens):
                raise errors.ProtocolError(f"Token {len(tokens)} of sample {delta.sample_index} is missing.")
            tokens += delta.token_ids
            if delta.finish is not None:
                self._finished.add(delta.sample_index)
            fresh.append(delta)
        if not fresh and update.usage is None and update.timeline is None:
            return None
        return Update(update.request_id, tuple(fresh), update.usage, update.timeline)

    def pause_before_retry_s(self, window_s: float) -> float | None:
        """How long to wait before the next attempt; None when the window is over."""
        if time.monotonic() - self._last_news_s > window_s:
            return None
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LAST_RETRY_S)
        return pause_s * random.uniform(0.5, 1.0)

    def resume_of(self, request: pb.GenerateRequest) -> pb.GenerateRequest:
        """The same request, asking for what is missing; it takes over from the broken stream."""
        resumed = pb.GenerateRequest()
        resumed.CopyFrom(request)
        del resumed.resume[:]
        for sample_index, tokens in sorted(self._tokens.items()) or [(0, [])]:
            resumed.resume.add(sample_index=sample_index, next_index=len(tokens), token_ids=tokens)
        return resumed


def _request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        # A resumed request must carry the same id, so the client chooses it.
        request_id=options.request_id or f"py-{uuid.uuid4().hex}",
        model=options.model,
        sampling=sampling_options_to_wire(options.sampling),
        slo_class=options.slo_class,
        priority=options.priority,
        timeout_s=options.timeout_s,
    )
    prompt_to_wire(prompt, request)
    return request


def _error_of(error: grpc.aio.AioRpcError, address: str) -> errors.TandemError:
    message = error.details() or error.code().name
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.Overloaded(message, _retry_after_s(error))
    if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in message.lower():
        return errors.NotReady(_nobody_listens(address))
    return _SIMPLE_ERRORS.get(error.code(), errors.TandemError)(message)


def _retry_after_s(error: grpc.aio.AioRpcError) -> float:
    """What the server advised in google.rpc.RetryInfo; a second without advice."""
    status = rpc_status.from_call(error)
    for detail in [] if status is None else status.details:
        advice = error_details_pb2.RetryInfo()
        if detail.Unpack(advice):
            return float(advice.retry_delay.ToNanoseconds() / 1e9)
    return 1.0


def _nobody_listens(address: str) -> str:
    return f"No router answers at {address}; `tandem up` starts one."


async def _open(address: str, api_key: str | None, resume_window_s: float) -> AsyncTandemClient:
    """The channel must be made inside the loop that it will use."""
    return AsyncTandemClient(address, api_key=api_key, resume_window_s=resume_window_s)


async def _next(stream: AsyncGenerator[Update, None]) -> Update | None:
    return await anext(stream, None)
