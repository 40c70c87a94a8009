"""The public gRPC API, as a plain grpcio client sees it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]
    reflection_pb2,
    reflection_pb2_grpc,
)
from grpc_status import rpc_status

from benchmarks.stub_script import StubSettings
from tandem.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2_grpc
from tandem.v1 import inference_pb2 as pb
from tandem.worker import Role
from tests.router.harness import (
    CONTEXT,
    MODEL,
    Cluster,
    cluster,
    expected,
    router_alone,
    text_of,
    tokens_of,
    until,
)

PROMPT = [10, 20, 30]


def sampling(max_tokens: int = 8, **more: object) -> pb.SamplingParams:
    return pb.SamplingParams(max_tokens=max_tokens, **more)  # type: ignore[arg-type]


def request(**more: object) -> pb.GenerateRequest:
    fields = {"token_ids": pb.TokenIds(ids=PROMPT), "sampling": sampling(), **more}
    return pb.GenerateRequest(**fields)  # type: ignore[arg-type]


async def serves(channel: grpc.aio.Channel, wanted: bool) -> bool:
    """Whether standard health says SERVING (or, when not wanted, NOT_SERVING)."""
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    kinds = health_pb2.HealthCheckResponse
    return bool(answer.status == (kinds.SERVING if wanted else kinds.NOT_SERVING))


@pytest.fixture
async def running(folder: Path) -> AsyncIterator[Cluster]:
    async with cluster(folder) as made:
        yield made


async def test_token_ids_text_and_chat_are_answered(running: Cluster) -> None:
    by_ids = await running.ask(request())
    assert tokens_of(by_ids) == expected(PROMPT, 8)
    text = pb.GenerateRequest(text="ab", sampling=sampling(3))
    assert len(tokens_of(await running.ask(text))) == 3
    assert list(running.stubs["p0"].prefills[-1].token_ids) == [3 + ord("a") - 33, 3 + ord("b") - 33]
    turns = [pb.ChatMessage(role="user", content="hi")]
    chat = pb.GenerateRequest(chat=pb.ChatPrompt(messages=turns), sampling=sampling(3))
    assert len(tokens_of(await running.ask(chat))) == 3
    sent = list(running.stubs["p0"].prefills[-1].token_ids)
    assert (sent[0], sent[-2:]) == (1, [0, 2])


async def test_last_response_carries_usage_and_a_timeline_that_adds_up(running: Cluster) -> None:
    responses = await running.ask(request(sampling=sampling(8, n=2)))
    *before, last = responses
    assert not any(response.HasField("usage") for response in before)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 16)
    times = last.timeline
    assert (times.prefill_worker, times.decode_worker, times.transport) == ("p0", "d0", "stub")
    assert times.handoff_bytes == 3
    assert times.ttft_s == pytest.approx(times.queue_s + times.prefill_s)
    assert 0.0 < times.ttft_s < 5.0
    assert times.slo_met
    assert times.slo_missed_by == ""


async def test_miss_of_the_slo_class_is_named(running: Cluster) -> None:
    responses = await running.ask(request(slo_class="strict"))
    assert not responses[-1].timeline.slo_met
    assert responses[-1].timeline.slo_missed_by in ("queue", "prefill")


async def test_one_token_needs_no_decode_worker(running: Cluster) -> None:
    before = len(running.stubs["d0"].decodes)
    responses = await running.ask(request(sampling=sampling(1)))
    assert tokens_of(responses) == expected(PROMPT, 1)
    assert responses[-1].timeline.decode_worker == ""
    assert len(running.stubs["d0"].decodes) == before


async def test_end_token_finishes_with_its_id(folder: Path) -> None:
    async with cluster(folder, StubSettings(end_id=0, end_index=3)) as running:
        responses = await running.ask(request())
        chunk = [chunk for response in responses for chunk in response.chunks][-1]
        assert chunk.finish_reason == pb.FINISH_REASON_STOP
        assert chunk.stop_token_id == 0
        assert len(tokens_of(responses)) == 4
        assert responses[-1].usage.completion_tokens == 4


async def test_stop_string_ends_and_is_not_part_of_the_text(running: Cluster) -> None:
    whole = text_of(expected(PROMPT, 8))
    stop = whole[3:5]
    responses = await running.ask(request(sampling=sampling(8, stop=[stop], ignore_eos=True)))
    chunks = [chunk for response in responses for chunk in response.chunks]
    assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].stop_string == stop
    await until(lambda: running.stubs["d0"].cancels, within_s=1.0)


async def test_logprobs_carry_the_bytes_of_each_token(running: Cluster) -> None:
    responses = await running.ask(request(sampling=sampling(4, logprobs=2)))
    entries = [entry for r in responses for chunk in r.chunks for entry in chunk.logprobs]
    assert [entry.token_id for entry in entries] == expected(PROMPT, 4)
    assert all(len(entry.token) == 1 and len(entry.top) == 2 for entry in entries)
    assert entries[0].logprob == pytest.approx(-0.5)


async def test_seed_follows_from_the_request_id_when_none_is_given(running: Cluster) -> None:
    for _ in range(2):
        await running.ask(request(request_id="same"))
    await running.ask(request(request_id="other"))
    seeds = [start.sampling.seed for start in list(running.stubs["p0"].prefills)[-3:]]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("with_tokens", [True, False])
async def test_resumed_request_goes_on_at_the_next_index(running: Cluster, with_tokens: bool) -> None:
    whole = expected(PROMPT, 8)
    point = pb.ResumePoint(sample_index=0, next_index=3, token_ids=whole[:3] if with_tokens else [])
    responses = await running.ask(request(request_id="again", resume=[point]))
    chunks = [chunk for response in responses for chunk in response.chunks]
    assert chunks[0].first_index == 3
    assert [t for chunk in chunks for t in chunk.token_ids] == whole[3:]
    assert responses[-1].usage.completion_tokens == 8


async def test_running_id_is_refused_and_taken_over_by_a_resume(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.02)) as running:
        long = request(request_id="mine", sampling=sampling(100, ignore_eos=True))
        first = asyncio.create_task(running.ask(long))
        await until(lambda: len(running.stubs["d0"].decodes) > 1)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await running.ask(long)
        assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
        again = request(
            request_id="mine",
            sampling=sampling(5, ignore_eos=True),
            resume=[pb.ResumePoint(sample_index=0, next_index=2)],
        )
        assert len((await running.ask(again))[-1].chunks) > 0
        with pytest.raises(grpc.aio.AioRpcError) as cancelled:
            await first
        assert cancelled.value.code() is grpc.StatusCode.CANCELLED


async def test_full_queue_answers_with_retry_info(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.02), max_queued=2, max_active=1) as running:
        asking = [
            asyncio.create_task(running.ask(request(sampling=sampling(60, ignore_eos=True))))
            for _ in range(3)
        ]
        await until(lambda: len(running.stubs["d0"].decodes) > 1)
        await asyncio.sleep(0.1)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await running.ask(request())
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        status = await rpc_status.aio.from_call(_AsCall(refused.value))
        info = error_details_pb2.RetryInfo()
        assert status is not None
        assert status.details[1].Unpack(info)
        assert info.retry_delay.seconds >= 1
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await until(lambda: running.stubs["d0"].cancels)


class _AsCall:
    """grpc_status reads details from a call; an AioRpcError has the same facts."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self._error = error

    async def code(self) -> grpc.StatusCode:
        return self._error.code()

    async def details(self) -> str | None:
        return self._error.details()

    async def trailing_metadata(self) -> object:
        return self._error.trailing_metadata()


async def test_invalid_field_is_named_in_the_details(running: Cluster) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await running.ask(request(sampling=sampling(temperature=3.0)))
    status = await rpc_status.aio.from_call(_AsCall(refused.value))
    bad = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad)
    reason = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(reason)
    assert (reason.reason, reason.domain) == ("InvalidRequest", "tandem")
    assert bad.field_violations[0].field == "sampling.temperature"


async def test_prompt_over_the_context_names_both_numbers(running: Cluster) -> None:
    long = request(token_ids=pb.TokenIds(ids=[5] * (CONTEXT + 7)))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await running.ask(long)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = refused.value.details() or ""
    assert str(CONTEXT) in details
    assert str(CONTEXT + 7) in details


async def test_grpc_deadline_is_honoured(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.05)) as running:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.ask(request(sampling=sampling(200, ignore_eos=True)), timeout_s=0.3)
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: running.stubs["d0"].cancels, within_s=1.0)


async def test_models_status_health_and_reflection(running: Cluster) -> None:
    async with grpc.aio.insecure_channel(running.grpc) as channel:
        models = await inference_pb2_grpc.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
        assert [(m.name, m.context_tokens) for m in models.models] == [(MODEL, CONTEXT)]
        await running.ask(request())
        status = await cluster_pb2_grpc.ClusterServiceStub(channel).Status(cluster_pb2.StatusRequest())
        assert status.ready
        assert {w.worker.worker_id: w.attached for w in status.workers} == {"p0": True, "d0": True}
        assert {c.name: (c.offered, c.good) for c in status.slo_classes} == {
            "chat": (1, 1),
            "strict": (0, 0),
        }
        await until(lambda: serves(channel, True))
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
        names = [s.name async for r in call for s in r.list_services_response.service]
        assert {"tandem.v1.InferenceService", "tandem.v1.ClusterService"} <= set(names)


async def test_health_is_not_serving_without_workers(folder: Path) -> None:
    async with router_alone(folder) as running, grpc.aio.insecure_channel(running.grpc) as channel:
        await until(lambda: serves(channel, False))
        await running.add("p0", Role.PREFILL)
        await running.add("d0", Role.DECODE)
        await until(lambda: serves(channel, True))


async def test_api_key_guards_everything_but_health(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_API_KEY", "secret")
    async with cluster(folder) as running, grpc.aio.insecure_channel(running.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                [_ async for _ in stub.Generate(request(), metadata=metadata)]
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        key = (("authorization", "Bearer secret"),)
        assert [_ async for _ in stub.Generate(request(), metadata=key)]
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
