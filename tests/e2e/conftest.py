"""What the end-to-end tests share: the reference and its answers, and clusters on this machine."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from tests.e2e.live_cluster import LiveCluster, live_cluster
from tests.e2e.prompts import chat_prompts
from tests.e2e.reference import Reference, file_facts

MAX_TOKENS = 24
TIMEOUT_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test that needs the reference waits for it, and clusters take seconds to start."""
    for item in items:
        if item.get_closest_marker("timeout") is None and item.get_closest_marker("e2e") is not None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@dataclass(frozen=True)
class Expectation:
    """A conversation, its tokens, and transformers' greedy continuation."""

    messages: list[dict[str, str]]
    prompt: list[int]
    greedy: list[int]


@pytest.fixture(scope="session")
def reference() -> Reference:
    """transformers' SmolLM2 in float32, on one thread: two of them crawl when the machine is shared."""
    torch.set_num_threads(1)
    return Reference.load()


@pytest.fixture(scope="session")
def expectations(request: pytest.FixtureRequest) -> list[Expectation]:
    """24 prompts with their greedy continuations; computed before any cluster runs, kept for next time."""
    conversations = chat_prompts()
    facts = [conversations, MAX_TOKENS, torch.__version__, transformers.__version__, file_facts()]
    key = "tandem/expectations-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    kept = request.config.cache.get(key, None) if request.config.cache is not None else None
    if kept is None:
        reference: Reference = request.getfixturevalue("reference")
        prompts = [reference.chat_tokens(messages) for messages in conversations]
        kept = [[prompt, reference.greedy(prompt, MAX_TOKENS)] for prompt in prompts]
        if request.config.cache is not None:
            request.config.cache.set(key, kept)
    return [
        Expectation(messages, prompt, greedy)
        for messages, (prompt, greedy) in zip(conversations, kept, strict=True)
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
