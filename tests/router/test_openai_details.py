"""The details of the OpenAI door that clients rely on: codes, headers, stream shapes, refusals by name."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.openai_schema import ChatBody, CompletionBody
from tests.router.harness import CONTEXT, Cluster, cluster, router_alone, text_of

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
    part = {"type": "image_url", "image_url": {"url": "x"}}
    for path, body, expected in (
        ("chat/completions", long, ("context_length_exceeded", "messages")),
        ("completions", {**TEXT, "prompt": [5] * 2 * CONTEXT}, ("context_length_exceeded", "prompt")),
        ("completions", {**TEXT, "model": "other"}, ("model_not_found", "model")),
        ("completions", {**TEXT, "n": 99}, ("invalid_value", "n")),
        ("completions", {**TEXT, "suffix": "x"}, ("unsupported_parameter", "suffix")),
        (
            "chat/completions",
            {**CHAT, "messages": [{"role": "user", "content": [part]}]},
            ("unsupported_parameter", "messages[0].content[0]"),
        ),
        ("nothing", {}, ("unknown_url", None)),
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
        ("completions", "guided_decoding_backend", "auto"),
        ("completions", "skip_special_tokens", False),
        ("completions", "truncate_prompt_tokens", 5),
        ("completions", "allowed_token_ids", [5]),
        ("chat/completions", "echo", True),
        ("chat/completions", "chat_template", "x"),
        ("chat/completions", "continue_final_message", True),
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
    for kind, good in ((CompletionBody, TEXT), (ChatBody, CHAT)):
        nulls = dict.fromkeys(set(kind.model_fields) - {"prompt", "messages", "max_tokens"})
        path = "/completions" if kind is CompletionBody else "/chat/completions"
        assert (await door.post(path, json={**good, **nulls})).status_code == 200
    usage = {"stream": True, "stream_options": {"include_usage": None}}
    assert (await door.post("/completions", json={**TEXT, **usage})).status_code == 200


async def test_harmless_values_and_unknown_fields_are_let_through(door: httpx.AsyncClient) -> None:
    harmless = {"skip_special_tokens": True, "bad_words": [], "guided_json": None, "use_beam_search": False}
    more = {"reasoning_effort": "high", "service_tier": "auto", "whatever": [1]}
    assert (await door.post("/chat/completions", json={**CHAT, **harmless, **more})).status_code == 200
    assert (await door.post("/completions", json={**TEXT, **harmless, **more})).status_code == 200


async def test_a_lower_priority_goes_first_as_in_vllm(door: httpx.AsyncClient, running: Cluster) -> None:
    await door.post("/completions", json={**TEXT, "priority": -7})
    assert running.stubs["p0"].prefills[-1].priority == 7
    refused = await door.post("/completions", json={**TEXT, "priority": 101})
    assert "not 101" in refused.json()["error"]["message"]


async def test_min_tokens_beyond_the_room_is_refused(door: httpx.AsyncClient) -> None:
    answer = await door.post("/chat/completions", json={"messages": CHAT["messages"], "min_tokens": CONTEXT})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "min_tokens"
    prompt_tokens = len("user:hi") + 3
    assert f"{CONTEXT}," in error["message"]
    assert f"room for {CONTEXT - prompt_tokens} tokens" in error["message"]


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


@pytest.mark.parametrize("prompt", [text_of([5, 6, 7]), [5, 6, 7], [[5, 6, 7], [5, 6, 7]]])
async def test_echo_puts_the_prompt_before_each_answer(door: httpx.AsyncClient, prompt: object) -> None:
    body = {**TEXT, "prompt": prompt, "n": 2}
    plain = [choice["text"] for choice in (await door.post("/completions", json=body)).json()["choices"]]
    whole = (await door.post("/completions", json={**body, "echo": True})).json()
    assert [choice["text"] for choice in whole["choices"]] == [text_of([5, 6, 7]) + text for text in plain]
    answer = await door.post("/completions", json={**body, "echo": True, "stream": True})
    streamed = [""] * len(plain)
    for line in answer.text.split("\n\n")[:-2]:
        for choice in json.loads(line[6:])["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [choice["text"] for choice in whole["choices"]]
    assert whole["usage"]["completion_tokens"] == 3 * len(plain)


async def test_echo_with_logprobs_is_refused(door: httpx.AsyncClient) -> None:
    answer = await door.post("/completions", json={**TEXT, "echo": True, "logprobs": 0})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "echo")


async def test_every_answer_carries_the_request_id_that_the_client_chose(
    door: httpx.AsyncClient, running: Cluster
) -> None:
    chosen = {"x-request-id": "job-7.a"}
    for path, body in (("completions", TEXT), ("completions", {**TEXT, "stream": True}), ("nothing", {})):
        answer = await door.post(f"/{path}", json=body, headers=chosen)
        assert answer.headers.get_list("x-request-id") == ["job-7.a"]
    first = await door.post("/completions", json=TEXT, headers=chosen)
    second = await door.post("/completions", json=TEXT, headers=chosen)
    assert first.json()["id"].startswith("cmpl-job-7.a-")
    assert first.json()["id"] != second.json()["id"]
    assert running.stubs["p0"].prefills[-1].request_id == second.json()["id"]
    wrong = await door.post("/completions", json=TEXT, headers={"x-request-id": "a b"})
    assert wrong.headers["x-request-id"] in wrong.json()["id"]
    assert " " not in wrong.headers["x-request-id"]


async def test_calls_with_the_same_request_id_do_not_hinder_each_other(door: httpx.AsyncClient) -> None:
    chosen = {"x-request-id": "shared"}
    asking = [door.post("/completions", json={**TEXT, "max_tokens": 50}, headers=chosen) for _ in range(4)]
    assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * 4


async def test_unready_router_says_when_to_come_back(folder: Path) -> None:
    async with router_alone(folder, park_requests_s=0.1) as running, httpx.AsyncClient() as plain:
        answer = await plain.post(f"{running.http}/v1/completions", json=TEXT)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "service_unavailable"


async def test_refusal_for_want_of_a_key_says_how_to_send_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_API_KEY", "secret")
    async with router_alone(folder) as running, httpx.AsyncClient(base_url=running.http) as plain:
        for wrong in ({}, {"authorization": "Bearer other"}, {"authorization": "Basic secret"}):
            refused = await plain.get("/v1/models", headers=wrong)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.headers["x-request-id"]
        for scheme in ("Bearer", "bearer", "BEARER"):
            headers = {"authorization": f"{scheme} secret"}
            assert (await plain.get("/v1/models", headers=headers)).status_code == 200


def test_every_field_that_is_refused_is_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs/http-api.md").read_text()
    refused = {*CompletionBody.refused_fields(), *ChatBody.refused_fields()}
    assert [name for name in sorted(refused) if f"`{name}`" not in page] == []
