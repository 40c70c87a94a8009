"""One router process from start to drained end."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest

from benchmarks.stub_script import StubSettings
from router.membership import FixedMembership
from router.server import serve_router
from tandem.errors import ConfigError
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc
from tandem.worker import Role
from tests.router.harness import cluster, config_for, expected, router_alone, tokens_of, until

PROMPT = [5, 6, 7]


def question(max_tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling)


async def test_drain_finishes_what_runs_and_takes_no_more(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.02), drain_timeout_s=10.0) as running:
        asking = asyncio.create_task(running.ask(question(30)))
        await until(lambda: len(running.stubs["d0"].decodes) > 1)
        running.stop.set()
        await asyncio.sleep(0.05)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await running.ask(question(3))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        async with httpx.AsyncClient(base_url=running.http) as plain:
            assert (await plain.get("/ready")).status_code == 503
            body = {"prompt": PROMPT, "max_tokens": 3}
            assert (await plain.post("/v1/completions", json=body)).status_code == 503
        assert tokens_of(await asking) == expected(PROMPT, 30)
        await asyncio.wait_for(running.serving, 5.0)


async def test_drain_is_bounded(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.05), drain_timeout_s=0.2) as running:
        asking = asyncio.create_task(running.ask(question(200)))
        await until(lambda: len(running.stubs["d0"].decodes) > 1)
        began_s = time.monotonic()
        running.stop.set()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await asking
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        await running.serving
        assert time.monotonic() - began_s < 5.0


async def test_router_waits_for_workers_that_come_later(folder: Path) -> None:
    async with router_alone(folder) as running:
        asking = asyncio.create_task(running.ask(question(4)))
        await asyncio.sleep(0.1)
        await running.add("p0", Role.PREFILL)
        await running.add("d0", Role.DECODE)
        assert tokens_of(await asking) == expected(PROMPT, 4)


async def test_taken_port_is_an_error_at_start(folder: Path) -> None:
    async with router_alone(folder) as running:
        config = replace(config_for(folder), http_port=running.ports.http_port)
        with pytest.raises(OSError, match="in use"):
            await serve_router(config, FixedMembership(()), asyncio.Event())
        config = replace(config_for(folder), grpc_port=running.ports.grpc_port)
        with pytest.raises(OSError, match="cannot be bound"):
            await serve_router(config, FixedMembership(()), asyncio.Event())


async def test_unknown_dispatch_policy_is_an_error_at_start(folder: Path) -> None:
    config = replace(config_for(folder), dispatch="best")
    with pytest.raises(ConfigError, match="dispatch must be one of"):
        await serve_router(config, FixedMembership(()), asyncio.Event())


async def test_slow_reader_gets_every_token_in_fewer_messages(folder: Path) -> None:
    async with cluster(folder) as running, grpc.aio.insecure_channel(running.grpc) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(question(200))
        await asyncio.sleep(0.3)
        responses = [response async for response in call]
        assert tokens_of(responses) == expected(PROMPT, 200)
        assert len(responses) <= 200


async def test_canaries_keep_the_router_ready_and_out_of_the_metrics(folder: Path) -> None:
    async with cluster(folder, canary_interval_s=0.2) as running:
        handoffs = running.stubs["d0"].handoffs
        await until(lambda: running.stubs["d0"].handoffs >= handoffs + 2)
        async with httpx.AsyncClient(base_url=running.http) as plain:
            assert (await plain.get("/ready")).status_code == 200
            text = (await plain.get("/metrics")).text
        assert "tandem_ttft_seconds_count 0.0" in text
        assert 'tandem_slo_offered_total{slo_class="chat"} 0.0' in text


async def test_wedged_pair_is_not_ready(folder: Path) -> None:
    async with cluster(folder, canary_interval_s=0.2) as running:
        running.stubs["d0"].settings.landing_s = 60.0
        async with httpx.AsyncClient(base_url=running.http) as plain:

            async def refused() -> bool:
                answer = await plain.get("/ready")
                return answer.status_code == 503 and "last hand-off" in answer.json()["reason"]

            await until(refused, within_s=5.0)


async def test_small_answers_do_not_wait_for_delayed_acknowledgements(folder: Path) -> None:
    async with cluster(folder) as running, httpx.AsyncClient(base_url=running.http) as plain:
        body = {"prompt": PROMPT, "max_tokens": 3, "stream": True}
        times_s = []
        for _ in range(15):
            began_s = time.monotonic()
            await plain.post("/v1/completions", json=body)
            times_s.append(time.monotonic() - began_s)
        assert sorted(times_s)[5] < 0.03


async def test_offered_legs_leave_the_prefill_window(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.05), prefill_window_tokens=len(PROMPT)) as running:
        asking = [asyncio.create_task(running.ask(question(100))) for _ in range(4)]
        before = len(running.stubs["d0"].decodes)
        await until(lambda: len(running.stubs["d0"].decodes) == before + 4, within_s=2.0)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
