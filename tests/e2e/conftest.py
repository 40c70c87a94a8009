"""What the end-to-end tests share: the reference and its answers, and clusters on this machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.e2e.live_cluster import LiveCluster, live_cluster
from tests.e2e.prompts import chat_prompts
from tests.e2e.reference import Reference

MAX_TOKENS = 24


@dataclass(frozen=True)
class Expectation:
    """A conversation, its tokens, and transformers' greedy continuation."""

    messages: list[dict[str, str]]
    prompt: list[int]
    greedy: list[int]


@pytest.fixture(scope="session")
def reference() -> Reference:
    """transformers' SmolLM2 in float32."""
    return Reference.load()


@pytest.fixture(scope="session")
def expectations(reference: Reference) -> list[Expectation]:
    """24 prompts with their greedy continuations; computed before any cluster runs."""
    torch.set_num_threads(2)
    prompts = [(messages, reference.chat_tokens(messages)) for messages in chat_prompts()]
    return [
        Expectation(messages, prompt, reference.greedy(prompt, MAX_TOKENS)) for messages, prompt in prompts
    ]


def settings(transport: str, decode_workers: int) -> dict[str, Any]:
    """A small cluster: prompts over 160 tokens are read in chunks, and pools hold a few long prompts."""
    return {
        "workers": {"transports": [transport]},
        "pools": {
            "prefill": {"token_budget": 160},
            "decode": {"replicas": decode_workers},
        },
    }


@pytest.fixture(scope="module", params=["shm", "tcp"])
def cluster(
    request: pytest.FixtureRequest,
    expectations: list[Expectation],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LiveCluster]:
    """One prefill and one decode worker, over each transport in turn."""
    with live_cluster(tmp_path_factory.mktemp("cluster"), settings(request.param, 1)) as running:
        yield running
