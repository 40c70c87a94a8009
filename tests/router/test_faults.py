"""Whatever happens to workers, the client sees every token once, in order, and the right ones."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest

from benchmarks.stub_script import Fault, FaultKind, StubSettings
from tandem.ids import Incarnation, WorkerId
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc
from tandem.v1 import worker_pb2 as wpb
from tandem.worker import Role, WorkerRecord
from tests.router.harness import (
    DIGEST,
    PRINTABLE,
    Cluster,
    cluster,
    expected,
    router_alone,
    tokens_of,
    until,
)

PROMPT = [5, 6, 7, 8, 9]
COUNT = 20


def question(max_tokens: int = COUNT, n: int = 1, timeout_s: float = 0.0) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, n=n, ignore_eos=True, seed=1)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling, timeout_s=timeout_s)


async def check(running: Cluster, n: int = 1) -> pb.Timeline:
    """Asks, holds the answer against what an undisturbed run gives, and returns the timeline."""
    responses = await running.ask(question(n=n))
    for sample in range(n):
        assert tokens_of(responses, sample) == expected(PROMPT, COUNT, sample)
    finishes = [c.finish_reason for r in responses for c in r.chunks if c.finish_reason]
    assert finishes == [pb.FINISH_REASON_LENGTH] * n
    assert responses[-1].usage.completion_tokens == n * COUNT
    return responses[-1].timeline


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "kind", [FaultKind.DUPLICATE, FaultKind.STALE, FaultKind.GAP, FaultKind.LAND_TWICE, FaultKind.DROP]
)
async def test_wrong_news_of_a_decode_worker_changes_no_token(folder: Path, kind: FaultKind, n: int) -> None:
    async with cluster(folder) as running:
        running.stubs["d0"].settings.faults.append(Fault(kind, at_index=7, times=2))
        timeline = await check(running, n)
        harmless = kind in (FaultKind.DUPLICATE, FaultKind.STALE)
        assert (timeline.replacements == 0) == harmless


@pytest.mark.parametrize(
    "reason",
    [
        wpb.DROP_REASON_OVERLOADED,
        wpb.DROP_REASON_HANDOFF_FAILED,
        wpb.DROP_REASON_DRAINING,
        wpb.DROP_REASON_INTERNAL,
    ],
)
async def test_leg_dropped_by_prefill_is_read_elsewhere(
    folder: Path, reason: "wpb.DropReason.ValueType"
) -> None:
    async with cluster(folder, pairs=2, dispatch="round_robin") as running:
        for name in ("p0", "p1"):
            running.stubs[name].settings.faults.append(Fault(FaultKind.DROP, at_index=0, reason=reason))
        timeline = await check(running)
        assert timeline.replacements == 2
        assert {len(running.stubs[name].prefills) > 0 for name in ("p0", "p1")} == {True}


async def test_decode_worker_dies_mid_stream_and_another_goes_on(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.002), pairs=2) as running:
        for name in ("d0", "d1"):
            running.stubs[name].settings.faults.append(Fault(FaultKind.DIE, at_index=9))
        running.stubs["d1"].settings.faults.clear()
        for _ in range(3):
            await check(running, n=2)
        assert running.stubs["d1"].decodes


async def test_prefill_worker_dies_before_token_0_and_another_reads(folder: Path) -> None:
    async with cluster(folder, StubSettings(prefill_s=0.05), pairs=2, dispatch="round_robin") as running:
        asking = asyncio.gather(check(running), check(running))
        await until(lambda: all(len(running.stubs[name].prefills) for name in ("p0", "p1")))
        running.stubs["p0"].die()
        timelines = await asking
        assert {timeline.prefill_worker for timeline in timelines} == {"p1"}


async def test_lone_worker_that_comes_back_under_a_new_incarnation_serves_again(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.005)) as running:
        asking = asyncio.create_task(check(running))
        await until(lambda: len(running.stubs["d0"].decodes) > 1)
        running.stubs["d0"].die()
        running.membership.drop("d0")
        await asyncio.sleep(0.1)
        began_s = time.monotonic()
        await running.add("d0", Role.DECODE, incarnation=2)
        assert (await asking).replacements >= 1
        assert time.monotonic() - began_s < 2.0


async def test_preemption_over_and_over_still_ends_with_all_tokens(folder: Path) -> None:
    async with cluster(folder, max_replacements=1) as running:
        faults = [Fault(FaultKind.DROP, index, reason=wpb.DROP_REASON_PREEMPTED) for index in range(2, 12)]
        running.stubs["d0"].settings.faults.extend(faults)
        assert (await check(running)).replacements == 10


async def test_failures_beyond_the_bound_fail_the_request(folder: Path) -> None:
    async with cluster(folder, max_replacements=2) as running:
        faults = [Fault(FaultKind.DROP, index, reason=wpb.DROP_REASON_INTERNAL) for index in range(3, 9)]
        running.stubs["d0"].settings.faults.extend(faults)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await check(running)
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        running.stubs["d0"].settings.faults.clear()
        await check(running)


async def test_stopped_worker_is_lost_within_two_seconds(folder: Path) -> None:
    options = f"--role decode --step-ms 20 --vocabulary {PRINTABLE} --digest {DIGEST}".split()
    command = (sys.executable, "-m", "benchmarks.stub_worker", *options)
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        async with router_alone(folder, canary_interval_s=60.0) as running:
            assert process.stdout is not None
            told = json.loads(await process.stdout.readline())
            await running.add("p0", Role.PREFILL)
            record = WorkerRecord(
                WorkerId(told["worker_id"]), Incarnation(1), Role.DECODE, told["address"], DIGEST
            )
            running.membership.put(record)
            await running.ready()
            asking = asyncio.create_task(check(running))
            await until(lambda: len(running.stubs["p0"].prefills) > 1)
            await asyncio.sleep(0.1)
            os.kill(process.pid, signal.SIGSTOP)
            began_s = time.monotonic()
            await running.add("d1", Role.DECODE)
            assert (await asking).replacements >= 1
            assert time.monotonic() - began_s < 3.5
    finally:
        process.kill()
        await process.wait()


async def test_worker_of_another_digest_gets_nothing(folder: Path) -> None:
    async with cluster(folder) as running:
        other = await running.add("d9", Role.DECODE, digest="another")
        await check(running)
        assert not other.decodes


@pytest.mark.parametrize("after_tokens", [1, 5])
async def test_client_that_leaves_frees_both_workers_at_once(folder: Path, after_tokens: int) -> None:
    async with cluster(folder, StubSettings(step_s=0.01, landing_s=0.02)) as running:
        async with grpc.aio.insecure_channel(running.grpc) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(question(200))
            seen = 0
            async for response in call:
                seen += sum(len(chunk.token_ids) for chunk in response.chunks)
                if seen >= after_tokens:
                    break
            call.cancel()
        cancels = [stub.cancels for stub in running.stubs.values()]
        await until(lambda: any(cancels), within_s=1.0)
        told = {cancel.leg_id for queue in cancels for cancel in queue}
        assert told <= {start.leg_id for start in running.stubs["p0"].prefills}


async def test_deadline_cancels_the_request_everywhere(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.05)) as running:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.ask(question(200, timeout_s=0.3))
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: running.stubs["d0"].cancels, within_s=1.0)


async def test_request_waits_boundedly_for_a_decode_worker(folder: Path) -> None:
    async with cluster(folder, park_requests_s=0.5) as running:
        running.stubs["d0"].die()
        running.membership.drop("d0")
        began_s = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await check(running)
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "No decode worker" in (failed.value.details() or "")
        assert 0.4 < time.monotonic() - began_s < 3.0
        await until(lambda: running.stubs["p0"].cancels, within_s=1.0)


async def test_fifty_requests_at_once_survive_a_dying_worker(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.005), pairs=2) as running:
        asking = asyncio.gather(*[check(running, n=1 + number % 3) for number in range(50)])
        await until(lambda: len(running.stubs["d0"].decodes) > 5)
        running.stubs["d0"].die()
        await asking
