"""The OpenAI API, as the official client and plain HTTP see it."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from benchmarks.stub_script import StubSettings
from tests.router.harness import CONTEXT, MODEL, Cluster, cluster, expected, router_alone, text_of, until


@pytest.fixture
async def running(folder: Path) -> AsyncIterator[Cluster]:
    async with cluster(folder) as made:
        yield made


@pytest.fixture
async def client(running: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{running.http}/v1", api_key="any", max_retries=0) as made:
        yield made


async def test_models_are_listed(client: AsyncOpenAI) -> None:
    models = await client.models.list()
    assert [model.id for model in models.data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_chat_whole_and_streamed_say_the_same(client: AsyncOpenAI) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    whole = await client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=12)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.usage.prompt_tokens_details is not None
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=messages,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert finishes == ["length"]


async def test_completions_take_every_kind_of_prompt(client: AsyncOpenAI, running: Cluster) -> None:
    one = await client.completions.create(model=MODEL, prompt="ab")
    assert one.usage is not None
    assert one.usage.completion_tokens == 16
    ids = [5, 6, 7]
    by_ids = await client.completions.create(model=MODEL, prompt=ids, max_tokens=4, n=2)
    assert [choice.index for choice in by_ids.choices] == [0, 1]
    both = await client.completions.create(model=MODEL, prompt=[ids, [8, 9]], max_tokens=4, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == by_ids.choices[0].text
    assert both.usage is not None
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (5, 16)
    texts = await client.completions.create(model=MODEL, prompt=["ab", "cd"], max_tokens=3)
    assert texts.choices[0].text == one.choices[0].text[: len(texts.choices[0].text)]


async def test_several_prompts_stream_into_their_own_choices(client: AsyncOpenAI) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    whole = await client.completions.create(model=MODEL, prompt=prompts, max_tokens=6)
    texts = ["", ""]
    async for chunk in await client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=6, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


async def test_logprobs_of_both_kinds(client: AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "x"}],
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert [len(entry.top_logprobs) for entry in content] == [2, 2, 2]
    assert content[0].bytes is not None
    legacy = await client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=3, logprobs=1)
    assert legacy.choices[0].logprobs is not None
    assert legacy.choices[0].logprobs.token_logprobs == [-0.5] * 3
    plain = await client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=3)
    assert plain.choices[0].logprobs is None


async def test_vllm_extras_reach_the_workers(client: AsyncOpenAI, running: Cluster) -> None:
    extras = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "some_unknown_field": 1,
    }
    await client.completions.create(
        model=MODEL, prompt=[5], max_tokens=3, seed=-1, logit_bias={"9": 5}, extra_body=extras
    )
    sent = running.stubs["p0"].prefills[-1].sampling
    assert (sent.top_k, sent.min_tokens, sent.ignore_eos) == (5, 2, True)
    assert list(sent.stop_token_ids) == [7]
    assert sent.seed == 2**64 - 1
    assert dict(sent.logit_bias) == {9: 5.0}


async def test_stop_strings_end_the_text(client: AsyncOpenAI) -> None:
    free = await client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=10)
    stop = free.choices[0].text[2:4]
    cut = await client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=10, stop=stop)
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == free.choices[0].text[: free.choices[0].text.index(stop)]


async def test_errors_are_of_the_clients_own_kinds(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model=MODEL, prompt=[5], temperature=9)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="other", prompt=[5])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model=MODEL, prompt=[5] * 300)
    assert str(CONTEXT) in str(long.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(running: Cluster, field: str, value: object) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], field: value}
    async with httpx.AsyncClient() as plain:
        answer = await plain.post(f"{running.http}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


async def test_raw_stream_is_server_sent_events_that_end_with_done(running: Cluster) -> None:
    body = {"model": MODEL, "prompt": [5, 6], "max_tokens": 3, "stream": True}
    async with httpx.AsyncClient() as plain:
        answer = await plain.post(f"{running.http}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line for line in answer.text.split("\n\n") if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[0][6:])["object"] == "text_completion"


async def test_unknown_path_and_method_answer_in_openai_json(running: Cluster) -> None:
    async with httpx.AsyncClient(base_url=running.http) as plain:
        for answer, status in (
            (await plain.get("/v1/nothing"), 404),
            (await plain.get("/v1/completions"), 405),
            (await plain.post("/v1/completions", content=b"{"), 400),
        ):
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_body_over_the_limit_is_refused(folder: Path) -> None:
    async with cluster(folder, max_body_bytes=1000) as running, httpx.AsyncClient() as plain:
        answer = await plain.post(f"{running.http}/v1/completions", content=b"x" * 2000)
        assert answer.status_code == 413
        assert "1000" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_disconnects_cancels_its_request(folder: Path, stream: bool) -> None:
    async with cluster(folder, StubSettings(step_s=0.02)) as running:
        body = {"model": MODEL, "prompt": [5], "max_tokens": 200, "stream": stream, "ignore_eos": True}
        async with httpx.AsyncClient() as plain:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await plain.post(f"{running.http}/v1/completions", json=body)
        await until(lambda: running.stubs["d0"].cancels, within_s=2.0)


async def test_full_queue_is_429_with_retry_after(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.02), max_queued=1, max_active=1) as running:
        body = {"model": MODEL, "prompt": [5], "max_tokens": 100, "ignore_eos": True}
        async with httpx.AsyncClient(base_url=running.http) as plain:
            asking = [asyncio.create_task(plain.post("/v1/completions", json=body)) for _ in range(2)]
            await until(lambda: len(running.stubs["d0"].decodes) > 1)
            await asyncio.sleep(0.1)
            refused = await plain.post("/v1/completions", json=body)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)


async def test_key_guards_the_api_but_not_health(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_API_KEY", "secret")
    async with cluster(folder) as running, httpx.AsyncClient(base_url=running.http) as plain:
        refused = await plain.get("/v1/models")
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        key = {"authorization": "Bearer secret"}
        assert (await plain.get("/v1/models", headers=key)).status_code == 200
        assert (await plain.get("/health")).status_code == 200


async def test_not_ready_says_why(folder: Path) -> None:
    async with router_alone(folder) as running, httpx.AsyncClient(base_url=running.http) as plain:
        answer = await plain.get("/ready")
        assert answer.status_code == 503
        assert "No prefill worker" in answer.json()["reason"]
        assert (await plain.get("/health")).status_code == 200


async def test_metrics_tell_of_requests_tokens_and_blocks(client: AsyncOpenAI, running: Cluster) -> None:
    await client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=4)
    async with httpx.AsyncClient(base_url=running.http) as plain:
        text = (await plain.get("/metrics")).text
    for line in (
        'tandem_requests_total{outcome="finished",slo_class="chat"} 1.0',
        'tandem_tokens_total{kind="completion"} 4.0',
        "tandem_ttft_seconds_count 1.0",
        "tandem_handoff_seconds_count 1.0",
        "tandem_queued_requests 0.0",
        "tandem_ready 1.0",
        'tandem_slo_good_total{slo_class="chat"} 1.0',
        'tandem_router_worker_kv_blocks{state="unaccounted",worker="d0"} 0.0',
    ):
        assert line in text.splitlines()
    gaps = [line for line in text.splitlines() if line.startswith("tandem_itl_seconds_count")]
    assert float(gaps[0].split()[1]) == 3.0


async def test_text_of_the_stub_is_what_the_formula_gives(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=[50, 60], max_tokens=5)
    assert answer.choices[0].text == text_of(expected([50, 60], 5))
