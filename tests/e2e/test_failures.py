"""What dies, and what the client sees: the table of docs/architecture.md, row by row."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import grpc
import grpc.aio
import httpx
import pytest

from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc
from tests.e2e.calls import Collected, generate, generate_on, greedy_request
from tests.e2e.conftest import MAX_TOKENS, Expectation, settings
from tests.e2e.live_cluster import LiveCluster, listener, live_cluster, wait_until_ready

pytestmark = pytest.mark.e2e

LONG_OUTPUT_TOKENS = 120
BACK_IN_ROTATION_S = 5.0 + 15.0
"""5 s, plus the model's load and two imports of torch on a busy machine."""


@pytest.fixture(scope="module")
def cluster(
    expectations: list[Expectation], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveCluster]:
    """One prefill and one decode worker, so that nobody else can step in."""
    with live_cluster(tmp_path_factory.mktemp("failures"), settings("shm", 1)) as running:
        yield running


def _long_request(expected: Expectation) -> pb.GenerateRequest:
    request = greedy_request(expected.prompt, LONG_OUTPUT_TOKENS)
    request.sampling.ignore_eos = True
    return request


def _incarnations(cluster: LiveCluster) -> dict[str, int]:
    return {w.worker.worker_id: w.worker.incarnation for w in cluster.status().workers if w.attached}


async def _wait_for_new_incarnation(cluster: LiveCluster, worker_id: str, old: int) -> float:
    started = time.monotonic()
    async with asyncio.timeout(60.0):
        while (await asyncio.to_thread(_incarnations, cluster)).get(worker_id, old) == old:
            await asyncio.sleep(0.1)
    return time.monotonic() - started


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
async def test_a_killed_worker_costs_a_pause_and_comes_back_under_a_new_incarnation(
    cluster: LiveCluster, expectations: list[Expectation], victim: str
) -> None:
    request = _long_request(expectations[6])
    undisturbed = await generate(cluster.grpc_address, request)
    old = _incarnations(cluster)[victim]
    collected = Collected()
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        killed = False
        async for response in stub.Generate(request, timeout=120.0):
            collected.take(response)
            if not killed and len(collected.tokens[0]) >= (5 if victim == "decode-0" else 1):
                os.kill(await asyncio.to_thread(cluster.worker_pid, victim), signal.SIGKILL)
                killed = True
    assert collected.tokens == undisturbed.tokens
    took_s = await _wait_for_new_incarnation(cluster, victim, old)
    assert took_s < BACK_IN_ROTATION_S
    again = await generate(cluster.grpc_address, request)
    assert again.tokens == undisturbed.tokens
    cluster.wait_until_blocks_are_accounted()


async def test_a_client_that_leaves_frees_both_workers(
    cluster: LiveCluster, expectations: list[Expectation]
) -> None:
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        streams = [stub.Generate(_long_request(expectations[i]), timeout=60.0) for i in range(6)]
        for index, stream in enumerate(streams):
            for _ in range(index):
                await stream.read()
            stream.cancel()
    async with httpx.AsyncClient() as client, asyncio.timeout(30.0):
        body = {"prompt": "Once upon a time", "max_tokens": 200, "stream": True}
        url = f"http://{cluster.http_address}/v1/completions"
        async with client.stream("POST", url, json=body) as response:
            await anext(response.aiter_lines())
    await asyncio.to_thread(cluster.wait_until_blocks_are_accounted)


async def test_serving_goes_on_while_redis_is_away(
    cluster: LiveCluster, expectations: list[Expectation]
) -> None:
    redis = next(p for p in cluster.descendants() if "valkey" in p.name())
    redis.send_signal(signal.SIGSTOP)
    try:
        expected = expectations[0]
        for _ in range(8):
            output = await generate(cluster.grpc_address, greedy_request(expected.prompt, MAX_TOKENS))
            assert output.tokens[0] == expected.greedy
            await asyncio.sleep(0.5)
    finally:
        redis.send_signal(signal.SIGCONT)
    output = await generate(cluster.grpc_address, greedy_request(expected.prompt, MAX_TOKENS))
    assert output.tokens[0] == expected.greedy


async def test_a_deadline_is_kept_and_frees_the_blocks(
    cluster: LiveCluster, expectations: list[Expectation]
) -> None:
    request = _long_request(expectations[6])
    request.timeout_s = 0.5
    with pytest.raises(grpc.RpcError) as caught:
        await generate(cluster.grpc_address, request)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.to_thread(cluster.wait_until_blocks_are_accounted)


async def test_a_dead_router_comes_back_and_the_client_resumes(
    cluster: LiveCluster, expectations: list[Expectation]
) -> None:
    request = _long_request(expectations[5])
    request.request_id = "survivor-1"
    undisturbed = await generate(cluster.grpc_address, request)
    collected = Collected()
    with pytest.raises(grpc.RpcError) as caught:
        async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            async for response in stub.Generate(request, timeout=60.0):
                collected.take(response)
                if len(collected.tokens[0]) == 10:
                    listener(cluster.grpc_address).kill()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await asyncio.to_thread(wait_until_ready, cluster)
    seen = collected.tokens[0]
    request.resume.append(pb.ResumePoint(sample_index=0, next_index=len(seen), token_ids=seen))
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        async for response in stub.Generate(request, timeout=60.0):
            collected.take(response)
    assert collected.tokens == undisturbed.tokens
    request.ClearField("resume")
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert (await generate_on(stub, request)).tokens == undisturbed.tokens
    await asyncio.to_thread(cluster.wait_until_blocks_are_accounted)
