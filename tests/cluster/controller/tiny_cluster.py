"""Edge: a whole cluster of small workers with a random model, and what its routers and registry show."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import transformers

from cluster.config_file import parse_cluster_config
from cluster.launch import RunningCluster, running_cluster
from planner.control.load_window import RolePlacement
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc
from tests.cluster.polling import eventually
from tests.engine.tiny_models import SIZES, random_model
from tests.router.harness import write_model_folder

CONTEXT = 2048
CHANGE_BOUND_S = 180.0
"""Drain, start of a process, its imports and its model, on a machine that is busy with tests."""

ANSWER_BOUND_S = 240.0

SETTINGS = """
model: {{source: {folder}}}
pools:
  prefill: {{memory: 64MiB, threads: 1}}
  decode: {{memory: 64MiB, threads: 1, replicas: 2}}
workers: {{transports: [tcp]}}
router: {{grpc_port: 0, http_port: 0}}
slo_classes:
  interactive: {{ttft_s: 60, tpot_s: 60, longest_gap_s: 60}}
"""


def save_model(folder: Path) -> Path:
    """A random Llama with a byte-level tokenizer."""
    write_model_folder(folder)
    sizes = SIZES | {"vocab_size": 259, "max_position_embeddings": CONTEXT, "eos_token_id": 0}
    random_model(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


@asynccontextmanager
async def tiny_cluster(folder: Path, more: str = "") -> AsyncIterator[RunningCluster]:
    """One prefill and two decode workers; `more` is appended to cluster.yaml."""
    text = SETTINGS.format(folder=folder) + more
    async with running_cluster(parse_cluster_config(text, "test"), say=lambda line: None) as cluster:
        yield cluster


async def placement_of(cluster: RunningCluster) -> RolePlacement:
    """Who is registered now."""
    names = list(await cluster.workers())
    return RolePlacement(
        sum(name.startswith("prefill") for name in names), sum(name.startswith("decode") for name in names)
    )


async def until_placed(cluster: RunningCluster, placement: RolePlacement) -> None:
    """Waits until these workers are registered."""

    async def is_so() -> bool:
        return await placement_of(cluster) == placement

    await eventually(is_so, CHANGE_BOUND_S)


class Load:
    """Requests that are kept running, each with its prompt and its answer."""

    def __init__(self, cluster: RunningCluster) -> None:
        self._channel = grpc.aio.insecure_channel(cluster.grpc_address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def answer(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The whole greedy answer; every token must come once and in order."""
        sampling = pb.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
        tokens: list[int] = []
        async for response in self._stub.Generate(request, timeout=ANSWER_BOUND_S):
            for chunk in response.chunks:
                assert not chunk.token_ids or chunk.first_index == len(tokens)
                tokens.extend(chunk.token_ids)
        return tokens

    async def answers(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """All answers, asked at once."""
        return list(await asyncio.gather(*(self.answer(prompt, max_tokens) for prompt in prompts)))
