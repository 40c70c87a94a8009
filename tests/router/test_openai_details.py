"""The details of the OpenAI door that clients rely on: codes, headers, stream shapes, refusals by name."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.router.harness import CONTEXT, Cluster, cluster

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
TEXT: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 3}


@pytest.fixture
async def running(folder: Path) -> AsyncIterator[Cluster]:
    async with cluster(folder) as made:
        yield made


@pytest.fixture
async def door(running: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"{running.http}/v1", timeout=20.0) as made:
        yield made


async def test_errors_carry_openais_codes_and_params(door: httpx.AsyncClient) -> None:
    long = {**CHAT, "messages": [{"role": "user", "content": "x" * 2 * CONTEXT}]}
    for path, body, expected in (
        ("chat/completions", long, ("context_length_exceeded", "messages")),
        ("completions", {**TEXT, "prompt": [5] * 2 * CONTEXT}, ("context_length_exceeded", "prompt")),
        ("completions", {**TEXT, "model": "other"}, ("model_not_found", "model")),
    ):
        answer = await door.post(f"/{path}", json=body)
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == expected
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("completions", "prompt_logprobs", 1),
        ("completions", "guided_json", {}),
        ("completions", "use_beam_search", True),
        ("completions", "add_special_tokens", False),
        ("chat/completions", "structured_outputs", {"regex": "a"}),
        ("chat/completions", "chat_template_kwargs", {"enable_thinking": False}),
        ("chat/completions", "bad_words", ["no"]),
    ],
)
async def test_what_would_change_the_answer_is_refused_by_name(
    door: httpx.AsyncClient, path: str, field: str, value: object
) -> None:
    body = CHAT if path.startswith("chat") else TEXT
    answer = await door.post(f"/{path}", json={**body, field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


async def test_nulls_stand_for_absent_fields(door: httpx.AsyncClient) -> None:
    nulls = dict.fromkeys(("priority", "slo_class", "temperature", "stop", "stream_options", "logit_bias"))
    assert (await door.post("/completions", json={**TEXT, **nulls})).status_code == 200


async def test_a_lower_priority_goes_first_as_in_vllm(door: httpx.AsyncClient, running: Cluster) -> None:
    await door.post("/completions", json={**TEXT, "priority": -7})
    assert running.stubs["p0"].prefills[-1].priority == 7


async def test_min_tokens_beyond_the_room_is_refused(door: httpx.AsyncClient) -> None:
    answer = await door.post("/chat/completions", json={"messages": CHAT["messages"], "min_tokens": CONTEXT})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "min_tokens"


async def test_a_chat_stream_starts_with_the_role_and_ends_with_the_finish(door: httpx.AsyncClient) -> None:
    answer = await door.post("/chat/completions", json={**CHAT, "stream": True})
    events = [line[6:] for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "length")
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert all(set(choice["delta"]) == {"content"} for choice in choices[1:-1])


async def test_the_chosen_token_is_among_the_top_logprobs(door: httpx.AsyncClient) -> None:
    answer = await door.post("/completions", json={**TEXT, "logprobs": 0})
    logprobs = answer.json()["choices"][0]["logprobs"]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top == {token: logprob}
