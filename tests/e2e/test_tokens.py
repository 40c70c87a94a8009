"""The cluster writes the tokens that transformers writes, whatever way they take."""

import grpc.aio
import psutil
import pytest

from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc
from tests.e2e.calls import Collected, generate, generate_all, greedy_request
from tests.e2e.conftest import MAX_TOKENS, Expectation
from tests.e2e.live_cluster import LiveCluster

pytestmark = pytest.mark.e2e


def _assert_equal(outputs: list[Collected], expectations: list[Expectation]) -> None:
    for output, expected in zip(outputs, expectations, strict=True):
        for sample, tokens in output.tokens.items():
            assert tokens == expected.greedy, f"sample {sample} of {expected.messages[-1]['content'][-40:]!r}"


async def test_greedy_tokens_equal_transformers_also_in_chunks(
    cluster: LiveCluster, expectations: list[Expectation]
) -> None:
    requests = [greedy_request(e.prompt, MAX_TOKENS) for e in expectations]
    outputs = await generate_all(cluster.grpc_address, requests, at_once=4)
    _assert_equal(outputs, expectations)
    transports = {output.timeline.transport for output in outputs if output.timeline}
    assert len(transports) == 1
    assert transports <= {"shm", "tcp"}


async def test_tokens_stay_equal_with_prefix_cache_hits(
    cluster: LiveCluster, expectations: list[Expectation]
) -> None:
    requests = [greedy_request(e.prompt, MAX_TOKENS) for e in expectations]
    await generate_all(cluster.grpc_address, requests[-6:], at_once=2)
    outputs = await generate_all(cluster.grpc_address, requests[-6:], at_once=2)
    _assert_equal(outputs, expectations[-6:])
    for output, expected in zip(outputs, expectations[-6:], strict=True):
        assert output.usage is not None
        assert output.usage.prompt_tokens == len(expected.prompt)
        assert output.usage.cached_tokens >= len(expected.prompt) - 2 * 16


async def test_two_samples_share_a_prompt_and_stay_equal(
    cluster: LiveCluster, expectations: list[Expectation]
) -> None:
    requests = [greedy_request(e.prompt, MAX_TOKENS, n=2) for e in expectations[:16]]
    outputs = await generate_all(cluster.grpc_address, requests, at_once=4)
    assert all(sorted(output.tokens) == [0, 1] for output in outputs)
    _assert_equal(outputs, expectations[:16])


async def test_tokens_stay_equal_when_batched_with_sixteen_others(
    cluster: LiveCluster, expectations: list[Expectation]
) -> None:
    others = [
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=e.prompt[: 20 + index]),
            sampling=pb.SamplingParams(temperature=1.0, seed=index, max_tokens=60, ignore_eos=True),
        )
        for index, e in enumerate(expectations[:16])
    ]
    watched = expectations[:8]
    requests = [*others, *(greedy_request(e.prompt, MAX_TOKENS) for e in watched)]
    outputs = await generate_all(cluster.grpc_address, requests, at_once=len(requests))
    _assert_equal(outputs[len(others) :], watched)
    assert all(len(output.tokens[0]) == 60 for output in outputs[: len(others)])


async def test_a_chat_request_is_rendered_as_transformers_renders_it(
    cluster: LiveCluster, expectations: list[Expectation]
) -> None:
    for expected in expectations[:6]:
        messages = [pb.ChatMessage(role=m["role"], content=m["content"]) for m in expected.messages]
        request = pb.GenerateRequest(
            chat=pb.ChatPrompt(messages=messages),
            sampling=pb.SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS),
        )
        output = await generate(cluster.grpc_address, request)
        assert output.usage is not None
        assert output.usage.prompt_tokens == len(expected.prompt)
        assert output.tokens[0] == expected.greedy


async def test_a_seeded_request_repeats_itself_and_resumes_where_the_client_stopped(
    cluster: LiveCluster, expectations: list[Expectation]
) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=expectations[4].prompt),
        sampling=pb.SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=24, ignore_eos=True),
    )
    first = await generate(cluster.grpc_address, request)
    again = await generate(cluster.grpc_address, request)
    assert again.tokens == first.tokens
    resumed = pb.GenerateRequest()
    resumed.CopyFrom(request)
    resumed.resume.append(pb.ResumePoint(sample_index=0, next_index=10, token_ids=first.tokens[0][:10]))
    rest: list[int] = []
    async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        async for response in stub.Generate(resumed, timeout=60.0):
            for chunk in response.chunks:
                if chunk.token_ids:
                    assert chunk.first_index == 10 + len(rest)
                rest.extend(chunk.token_ids)
    assert rest == first.tokens[0][10:]


def test_workers_keep_their_cores_beside_other_busy_processes(cluster: LiveCluster) -> None:
    usual = psutil.Process().nice()
    assert {psutil.Process(cluster.worker_pid(name)).nice() for name in ("prefill-0", "decode-0")} == {usual}


def test_no_block_is_left(cluster: LiveCluster) -> None:
    cluster.wait_until_blocks_are_accounted()
