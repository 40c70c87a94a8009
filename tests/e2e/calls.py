"""Calls to the public gRPC API that check the stream's promises while they collect it."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

import grpc.aio

from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc

CALL_TIMEOUT_S = 240.0


@dataclass
class Collected:
    """One request's output."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    text: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    finish: dict[int, "pb.FinishReason.ValueType"] = field(default_factory=dict)
    usage: pb.Usage | None = None
    timeline: pb.Timeline | None = None

    def take(self, response: pb.GenerateResponse) -> None:
        """Adds a response; every index must come exactly once and in order."""
        for chunk in response.chunks:
            have = self.tokens[chunk.sample_index]
            if chunk.token_ids:
                assert chunk.first_index == len(have), f"index {chunk.first_index} after {len(have)} tokens"
            assert chunk.sample_index not in self.finish, "tokens after the end"
            have.extend(chunk.token_ids)
            self.text[chunk.sample_index] += chunk.text
            if chunk.finish_reason:
                self.finish[chunk.sample_index] = chunk.finish_reason
        if response.HasField("usage"):
            self.usage = response.usage
        if response.HasField("timeline"):
            self.timeline = response.timeline


def greedy_request(prompt: list[int], max_tokens: int, n: int = 1) -> pb.GenerateRequest:
    """Greedy continuation of token ids."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=max_tokens, n=n),
    )


async def generate(address: str, request: pb.GenerateRequest) -> Collected:
    """Runs one request to its end on a channel of its own."""
    async with grpc.aio.insecure_channel(address) as channel:
        return await generate_on(inference_pb2_grpc.InferenceServiceStub(channel), request)


async def generate_on(
    stub: "inference_pb2_grpc.InferenceServiceAsyncStub", request: pb.GenerateRequest
) -> Collected:
    """Runs one request to its end."""
    collected = Collected()
    async for response in stub.Generate(request, timeout=CALL_TIMEOUT_S):
        collected.take(response)
    assert collected.usage is not None, "the last response carries the usage"
    assert collected.usage.completion_tokens == sum(map(len, collected.tokens.values()))
    return collected


async def generate_all(address: str, requests: list[pb.GenerateRequest], at_once: int) -> list[Collected]:
    """Runs requests, so many at once, in order of the list; answers in that order."""
    slots = asyncio.Semaphore(at_once)

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def one(request: pb.GenerateRequest) -> Collected:
            async with slots:
                return await generate_on(stub, request)

        return list(await asyncio.gather(*(one(request) for request in requests)))
