"""Edge: the Python client against a real gRPC server that answers by script: streams, breaks, errors."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tandem import errors, grpc_edge
from tandem.client import AsyncTandemClient, GenerateOptions, TandemClient
from tandem.generation import ChatMessage, SamplingOptions, TokenPrompt, Update
from tandem.sampling import FinishReason
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc

ANSWER = [11, 12, 13, 14, 15]


class OneModel(inference_pb2_grpc.InferenceServiceServicer):
    """The part that no test is about."""

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """See InferenceService."""
        return pb.ListModelsResponse(models=[pb.Model(name="m", context_tokens=64, vocabulary_tokens=100)])


class ScriptedService(OneModel):
    """Counts up tokens; breaks streams after so many, with the given status."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.break_after: list[int] = []
        self.status = grpc.StatusCode.UNAVAILABLE
        self.repeat_last_before_resuming = False
        self.cancelled = asyncio.Event()
        self.endless = False

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """See InferenceService."""
        self.requests.append(request)
        first = request.resume[0].next_index if request.resume else 0
        if first and self.repeat_last_before_resuming:
            yield response(request, first - 1)
        left = self.break_after.pop(0) if self.break_after else len(ANSWER)
        completed = False
        try:
            for index in range(first, len(ANSWER)):
                if left == 0:
                    await context.abort(self.status, "as scripted")
                left -= 1
                yield response(request, index)
            while self.endless:
                await asyncio.sleep(1)
            completed = True
        finally:
            if not completed:
                self.cancelled.set()
        yield pb.GenerateResponse(
            request_id=request.request_id, usage=pb.Usage(completion_tokens=len(ANSWER))
        )


def response(request: pb.GenerateRequest, index: int) -> pb.GenerateResponse:
    last = index == len(ANSWER) - 1
    chunk = pb.TokenChunk(
        first_index=index,
        token_ids=[ANSWER[index]],
        text=f"<{ANSWER[index]}>",
        finish_reason=pb.FINISH_REASON_LENGTH if last else pb.FINISH_REASON_UNSPECIFIED,
    )
    return pb.GenerateResponse(request_id=request.request_id, chunks=[chunk])


@asynccontextmanager
async def serving(service: ScriptedService, token: str | None = None) -> AsyncIterator[str]:
    server = grpc_edge.server(token)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def tokens_of(updates: list[Update]) -> list[int]:
    return [token for update in updates for delta in update.deltas for token in delta.token_ids]


async def ask(address: str, options: GenerateOptions | None = None) -> list[Update]:
    async with AsyncTandemClient(address) as client:
        return [update async for update in client.generate("hello", options)]


async def test_answer_streams_with_usage_at_the_end() -> None:
    service = ScriptedService()
    async with serving(service) as address:
        updates = await ask(address)
    assert tokens_of(updates) == ANSWER
    assert updates[-2].deltas[0].finish is FinishReason.LENGTH
    assert updates[-1].usage is not None
    assert updates[-1].usage.completion_tokens == len(ANSWER)


@pytest.mark.parametrize("repeats", [False, True])
async def test_stream_that_breaks_is_resumed_and_no_token_comes_twice(repeats: bool) -> None:
    service = ScriptedService()
    service.break_after = [2, 0, 1]
    service.repeat_last_before_resuming = repeats
    async with serving(service) as address:
        updates = await ask(address)
    assert tokens_of(updates) == ANSWER
    assert "".join(delta.text for update in updates for delta in update.deltas) == "<11><12><13><14><15>"
    assert len({request.request_id for request in service.requests}) == 1
    points = [(list(r.resume[0].token_ids), r.resume[0].next_index) for r in service.requests[1:]]
    assert points == [([11, 12], 2), ([11, 12], 2), ([11, 12, 13], 3)]


async def test_stream_that_broke_before_its_first_token_takes_the_request_over() -> None:
    service = ScriptedService()
    service.break_after = [0]
    async with serving(service) as address:
        assert tokens_of(await ask(address)) == ANSWER
    assert [(point.sample_index, point.next_index) for point in service.requests[1].resume] == [(0, 0)]


async def test_resuming_ends_with_its_window() -> None:
    service = ScriptedService()
    service.break_after = [0] * 100
    async with serving(service) as address, AsyncTandemClient(address, resume_window_s=0.3) as client:
        with pytest.raises(errors.NotReady, match="as scripted"):
            [update async for update in client.generate("hello")]
    assert 1 < len(service.requests) < 10


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, errors.UnknownModel),
        (grpc.StatusCode.ALREADY_EXISTS, errors.DuplicateRequest),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.INTERNAL, errors.TandemError),
    ],
)
async def test_status_becomes_the_error_of_our_tree(
    status: grpc.StatusCode, expected: type[errors.TandemError]
) -> None:
    service = ScriptedService()
    service.break_after, service.status = [0], status
    async with serving(service) as address:
        with pytest.raises(expected, match="as scripted") as caught:
            await ask(address)
    assert type(caught.value) is expected
    assert len(service.requests) == 1


class OverloadedService(OneModel):
    """Refuses everything, and says when to come back."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """See InferenceService."""
        detail = any_pb2.Any()
        detail.Pack(
            error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2, nanos=500_000_000))
        )
        status = status_pb2.Status(
            code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="full", details=[detail]
        )
        await context.abort_with_status(rpc_status.to_status(status))
        yield pb.GenerateResponse()


async def test_overload_says_when_to_come_back() -> None:
    server = grpc_edge.server(None)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(OverloadedService(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with pytest.raises(errors.Overloaded, match="full") as caught:
        await ask(f"127.0.0.1:{port}")
    await server.stop(None)
    assert caught.value.retry_after_s == 2.5


async def test_api_key_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(ScriptedService(), token="secret") as address:
        with pytest.raises(errors.Unauthenticated):
            await ask(address)
        monkeypatch.setenv(grpc_edge.API_KEY_ENV, "secret")
        assert tokens_of(await ask(address)) == ANSWER


async def test_nobody_listening_is_said_at_once() -> None:
    async with asyncio.timeout(5):
        with pytest.raises(errors.NotReady, match="tandem up"):
            await ask("127.0.0.1:1")


async def test_models_are_listed() -> None:
    async with serving(ScriptedService()) as address, AsyncTandemClient(address) as client:
        assert [model.name for model in await client.models()] == ["m"]


async def test_closing_the_stream_cancels_the_request() -> None:
    service = ScriptedService()
    service.endless = True
    async with serving(service) as address, AsyncTandemClient(address) as client:
        stream = client.generate("hello")
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(5):
            await service.cancelled.wait()


async def test_request_carries_what_was_chosen_and_nothing_else() -> None:
    service = ScriptedService()
    sampling = SamplingOptions(max_tokens=5, temperature=0.0, stop=("x",), logit_bias={3: 1.5})
    options = GenerateOptions(sampling, slo_class="batch", priority=7, request_id="mine", timeout_s=9.0)
    async with serving(service) as address, AsyncTandemClient(address) as client:
        prompts = ("text", [ChatMessage("user", "hi")], TokenPrompt([1, 2]), TokenPrompt([]))
        for prompt in prompts:
            assert [update async for update in client.generate(prompt, options)]
    text, chat, ids, empty = service.requests
    assert (text.text, chat.chat.messages[0].content, list(ids.token_ids.ids)) == ("text", "hi", [1, 2])
    assert empty.WhichOneof("prompt") == "token_ids"
    assert (text.request_id, text.slo_class, text.priority, text.timeout_s) == ("mine", "batch", 7, 9.0)
    assert (text.sampling.max_tokens, text.sampling.temperature) == (5, 0.0)
    assert text.sampling.HasField("temperature")
    assert not text.sampling.HasField("seed")
    assert not text.sampling.HasField("top_p")


def in_another_thread(service_test: Callable[[str], None]) -> None:
    """Runs a server on a loop in a thread, and the test here, where there is no loop."""
    addresses: list[str] = []
    started = threading.Event()
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        async with serving(ScriptedService()) as address:
            addresses.append(address)
            loops.append((asyncio.get_running_loop(), stop))
            started.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait(10)
    try:
        service_test(addresses[0])
    finally:
        loop, stop = loops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def test_synchronous_client_streams_the_same() -> None:
    def check(address: str) -> None:
        with TandemClient(address) as client:
            assert tokens_of(list(client.generate("hello"))) == ANSWER
            assert tokens_of(list(client.generate("again"))) == ANSWER

    in_another_thread(check)
