"""How a request's end is told: one log line, tokens and stages in the metrics, a stage for every miss."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
import structlog
from structlog.testing import capture_logs

from benchmarks.stub_script import Fault, FaultKind, StubSettings
from router.inference_service import InferenceService
from router.timeline import SampleTimes, Timeline
from tandem.slo import Stage
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc
from tests.router.harness import Cluster, cluster, router_alone, tokens_of, until
from tests.router.test_error_details import running_total

SLOW = StubSettings(step_s=0.05)


@pytest.fixture
def logged() -> Iterator[list[dict[str, Any]]]:
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        yield lines  # type: ignore[misc]


def question(request_id: str, max_tokens: int = 4, **more: object) -> pb.GenerateRequest:
    fields = {"token_ids": pb.TokenIds(ids=[10, 20, 30]), **more}
    params = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(request_id=request_id, sampling=params, **fields)  # type: ignore[arg-type]


def ends(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in logged if line["event"] == "request ended"]


async def cancelled_after_two(running: Cluster, request: pb.GenerateRequest) -> None:
    """Asks, reads two responses and leaves."""
    async with grpc.aio.insecure_channel(running.grpc) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
        await call.read()
        await call.read()
        call.cancel()


async def test_each_request_leaves_one_line_and_canaries_none(
    folder: Path, logged: list[dict[str, Any]]
) -> None:
    async with cluster(folder, SLOW, canary_interval_s=0.2) as running:
        await running.ask(question("whole"))
        await cancelled_after_two(running, question("left", 200))
        with pytest.raises(grpc.aio.AioRpcError):
            await running.ask(question("late", 200, timeout_s=0.3))
        await until(lambda: len(ends(logged)) == 3)
        handoffs = running.stubs["d0"].handoffs
        await until(lambda: running.stubs["d0"].handoffs > handoffs)
    lines = {line["request_id"]: line for line in ends(logged)}
    outcomes = {request_id: line["outcome"] for request_id, line in lines.items()}
    assert outcomes == {"whole": "finished", "left": "Cancelled", "late": "DeadlineExceeded"}
    assert all(line["log_level"] == "info" and line["slo_class"] == "chat" for line in lines.values())
    whole = lines["whole"]
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["replacements"]) == (3, 4, 0)
    assert whole["ttft_s"] > 0.0
    assert whole["tpot_s"] > 0.0


async def test_tokens_and_stages_of_a_request_that_did_not_finish_are_counted(folder: Path) -> None:
    async with cluster(folder, SLOW) as running:
        await cancelled_after_two(running, question("left", 200))
        await until(lambda: _ended(running, 1))
        text = await running.metrics()
    assert running_total(text, "tandem_ttft_seconds_count") == 1
    assert running_total(text, "tandem_queue_seconds_count") == 1
    assert running_total(text, "tandem_prefill_seconds_count") == 1
    assert running_total(text, 'tandem_tokens_total{kind="prompt"}') == 3
    assert running_total(text, 'tandem_tokens_total{kind="completion"}') >= 2


async def test_request_without_a_token_has_no_time_to_first_token(folder: Path) -> None:
    async with router_alone(folder, park_requests_s=0.1) as running:
        with pytest.raises(grpc.aio.AioRpcError):
            await running.ask(question("stranded"))
        text = await running.metrics()
    assert running_total(text, "tandem_ttft_seconds_count") == 0
    assert running_total(text, 'tandem_tokens_total{kind="prompt"}') == 3
    assert running_total(text, 'tandem_slo_missed_total{slo_class="chat",stage="queue"}') == 1


async def test_every_request_offered_is_good_or_missed_by_a_stage(folder: Path) -> None:
    async with cluster(folder, SLOW, max_active=1, max_queued=1) as running:
        await running.ask(question("good"))
        await running.ask(question("strict", slo_class="strict"))
        running_long = asyncio.create_task(_outcome(running, question("late", 200, timeout_s=0.8)))
        await until(lambda: len(running.stubs["d0"].decodes) > 3)
        queued = asyncio.create_task(_outcome(running, question("queued", timeout_s=0.3)))
        await until(lambda: _gauge(running, "tandem_queued_requests 1.0"))
        assert await _outcome(running, question("rejected")) == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await queued == await running_long == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: _ended(running, 5))
        lines = (await running.metrics()).splitlines()

    def total(name: str) -> float:
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}_total"))

    assert total("tandem_slo_offered") == 5
    assert total("tandem_slo_good") == 1
    assert total("tandem_slo_missed") == 4
    assert 'tandem_slo_missed_total{slo_class="chat",stage="queue"} 2.0' in lines
    assert 'tandem_slo_missed_total{slo_class="chat",stage="decode"} 1.0' in lines


def test_stage_that_a_request_reached_follows_its_stamps() -> None:
    line = Timeline(0.0, [SampleTimes()])
    reached = [line.reached]
    line.prefill_sent("p0", 1.0)
    reached.append(line.reached)
    line.emitted(0, 1, 2.0)
    reached.append(line.reached)
    line.landed("d0", "tcp", 1, 3.0)
    reached.append(line.reached)
    assert reached == [Stage.QUEUE, Stage.PREFILL, Stage.HANDOFF, Stage.DECODE]


async def test_faults_of_ours_and_of_workers_are_logged_with_the_request_id(
    folder: Path, logged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(folder) as running:
        running.stubs["d0"].settings.faults.append(Fault(FaultKind.LAND_TWICE, at_index=2))
        assert len(tokens_of(await running.ask(question("tricked", 6)))) == 6
        monkeypatch.setattr(InferenceService, "_response", lambda *_args: 1 / 0)
        with pytest.raises(grpc.aio.AioRpcError):
            await running.ask(question("broken"))
    for event, request_id in (
        ("protocol violated by worker", "tricked"),
        ("unexpected error in a call", "broken"),
    ):
        assert [line["request_id"] for line in logged if line["event"] == event] == [request_id]


@pytest.mark.parametrize("stream", [True, False])
async def test_http_calls_whose_reader_left_are_counted_as_499(folder: Path, stream: bool) -> None:
    async with cluster(folder, SLOW) as running:
        body = {"prompt": [5], "max_tokens": 200, "stream": stream, "ignore_eos": True}
        async with httpx.AsyncClient() as plain:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.4):
                    await plain.post(f"{running.http}/v1/completions", json=body)
        await until(lambda: _gauge(running, 'tandem_calls_total{api="http",code="499"} 1.0'), within_s=3.0)


async def _outcome(running: Cluster, request: pb.GenerateRequest) -> grpc.StatusCode:
    try:
        await running.ask(request)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def _gauge(running: Cluster, line: str) -> bool:
    return line in (await running.metrics()).splitlines()


async def _ended(running: Cluster, count: int) -> bool:
    lines = (await running.metrics()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("tandem_requests_total")) == count
