"""No request outlives its bounds: replacements, deadline, queue; and no work is spent on what can't fit."""

import asyncio
import time
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest

from benchmarks.stub_script import StubSettings
from router.slo_accounting import WINDOW_S, SloAccounting
from tandem.slo import SloClass
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc
from tests.router.harness import CONTEXT, cluster, tokens_of, until
from tests.router.test_faults import PROMPT, question

SLOW = StubSettings(step_s=0.05)


async def test_a_loss_beyond_the_last_replacement_fails_the_request_at_once(folder: Path) -> None:
    async with cluster(folder, SLOW, max_replacements=0) as running:
        async with grpc.aio.insecure_channel(running.grpc) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(question(200), timeout=20.0)
            await call.read()
            await call.read()
            began = time.monotonic()
            running.membership.drop("d0")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - began < 5.0


async def test_a_reader_that_stopped_reading_leaves_its_slot_at_the_deadline(folder: Path) -> None:
    async with (
        cluster(folder, SLOW, max_active=1) as running,
        grpc.aio.insecure_channel(running.grpc) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        stuck = stub.Generate(question(200, timeout_s=0.5), timeout=20.0)
        await stuck.read()
        responses = [response async for response in stub.Generate(question(3), timeout=20.0)]
        assert len(tokens_of(responses)) == 3
        stuck.cancel()


async def test_a_resume_that_is_refused_does_not_end_the_stream_that_runs(folder: Path) -> None:
    async with (
        cluster(folder, SLOW, max_active=1, max_queued=1) as running,
        grpc.aio.insecure_channel(running.grpc) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        first = question(30)
        first.request_id = "kept"
        kept = stub.Generate(first, timeout=20.0)
        reading = asyncio.ensure_future(_all_of(kept))
        await until(lambda: _gauge(running.http, "tandem_active_requests 1.0"))
        queued = asyncio.ensure_future(_all_of(stub.Generate(question(1), timeout=20.0)))
        await until(lambda: _gauge(running.http, "tandem_queued_requests 1.0"))
        resumed = pb.GenerateRequest()
        resumed.CopyFrom(first)
        resumed.resume.append(pb.ResumePoint(sample_index=0, next_index=1))

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _all_of(stub.Generate(resumed, timeout=20.0))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(tokens_of(await reading)) == 30
        await queued


async def _gauge(http: str, line: str) -> bool:
    async with httpx.AsyncClient() as client:
        return line in (await client.get(f"{http}/metrics")).text


async def _all_of(
    call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]",
) -> list[pb.GenerateResponse]:
    return [response async for response in call]


@pytest.mark.parametrize(
    "request_message",
    [
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT * 400_000)),
        pb.GenerateRequest(text="word " * 1_500_000),
        pb.GenerateRequest(
            chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="x" * 7_000_000)])
        ),
    ],
    ids=["token_ids", "text", "chat"],
)
async def test_a_prompt_that_cannot_fit_is_refused_before_it_is_read(
    folder: Path, request_message: pb.GenerateRequest
) -> None:
    async with cluster(folder) as running:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.ask(request_message)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert str(CONTEXT) in (caught.value.details() or "")


def test_goodput_of_a_steady_load_is_its_rate() -> None:
    slo = SloClass("a", 1.0, 1.0, 1.0)
    accounting = SloAccounting([slo], 0.0)
    for tick in range(3000):
        accounting.offered("a")
        accounting.good("a", tick / 10)
    for now_s in (300.0, 300.4, 300.9):
        (figures,) = accounting.figures(now_s)
        assert figures.goodput_rps == pytest.approx(10.0, rel=0.02), WINDOW_S
