"""Hundreds of bad requests get a clear client error each and no traceback; the router still answers."""

import json
import random
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx

from tandem.v1 import inference_pb2 as pb
from tests.router.harness import MODEL, cluster, expected, tokens_of

COUNT = 300
METHOD = "/tandem.v1.InferenceService/Generate"
HUGE = 10**30
NAN, INFINITY = float("nan"), float("inf")
CLIENT_FAULTS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
}


def bad_sampling(rng: random.Random) -> pb.SamplingParams:
    """Parameters with one field out of its range."""
    made: list[dict[str, Any]] = [
        {"temperature": rng.choice([-0.1, 2.1, NAN, INFINITY, -INFINITY, 1e300])},
        {"top_p": rng.choice([0.0, -1.0, 1.1, NAN, INFINITY])},
        {"top_k": rng.choice([2**31, 2**32 - 1])},
        {"min_p": rng.choice([-0.1, 1.5, NAN])},
        {"presence_penalty": rng.choice([-2.1, 2.1, NAN])},
        {"frequency_penalty": rng.choice([-3.0, 9.0, INFINITY])},
        {"repetition_penalty": rng.choice([0.0, -1.0, 10.5, NAN])},
        {"logit_bias": {5: rng.choice([101.0, -101.0, NAN])}},
        {"logit_bias": {rng.choice([259, 2**32 - 1]): 1.0}},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"stop": rng.choice([[""], ["x" * 257], ["y"] * 17])},
        {"stop_token_ids": rng.choice([[259], [5] * 65])},
        {"logprobs": rng.choice([21, 2**32 - 1])},
        {"n": rng.choice([0, 17, 2**32 - 1])},
        {"max_tokens": rng.choice([0, 257, 2**32 - 1])},
        {"max_tokens": 4, "min_tokens": 5},
    ]
    return pb.SamplingParams(**rng.choice(made))


def bad_message(rng: random.Random) -> bytes:
    """A GenerateRequest, as bytes, with one thing wrong with it."""
    good: dict[str, Any] = {"text": "ab", "sampling": pb.SamplingParams(max_tokens=4)}
    turns = [[], [pb.ChatMessage(role=rng.choice(["", "bot", "SYSTEM"]), content="x")]]
    made: list[dict[str, Any]] = [
        {**good, "sampling": bad_sampling(rng)},
        {"sampling": good["sampling"]},
        {**good, "text": ""},
        {**good, "text": "x" * rng.choice([257, 5_000])},
        {"token_ids": pb.TokenIds(ids=rng.choice([[], [259], [2**32 - 1], [5] * 300]))},
        {"chat": pb.ChatPrompt(messages=rng.choice(turns))},
        {**good, "request_id": rng.choice(["a b", "x" * 129, "é", "a\n", "../x y"])},
        {**good, "model": rng.choice(["other", "TINY", "tiny "])},
        {**good, "slo_class": rng.choice(["gold", "CHAT", "x" * 1000])},
        {**good, "priority": rng.choice([-101, 101, 2**31 - 1])},
        {**good, "timeout_s": rng.choice([-1.0, NAN, INFINITY, 1e12])},
        {**good, "resume": [pb.ResumePoint(sample_index=rng.choice([1, 2**32 - 1]))]},
        {**good, "resume": [pb.ResumePoint(next_index=5)]},
        {**good, "resume": [pb.ResumePoint(next_index=2, token_ids=[5])]},
        {**good, "resume": [pb.ResumePoint(next_index=1, token_ids=[2**31])]},
        {**good, "resume": [pb.ResumePoint(), pb.ResumePoint()]},
    ]
    if rng.random() < 0.15:
        return rng.choice([b"\x1a\x02\xff\xfe", b"\xff\xff", b"\x1a\x7fab", rng.randbytes(40) + b"\x1a\x05"])
    return pb.GenerateRequest(**rng.choice(made)).SerializeToString()


async def test_bad_grpc_requests_are_refused_with_a_clear_status(folder: Path) -> None:
    rng = random.Random(7)
    async with cluster(folder) as running, grpc.aio.insecure_channel(running.grpc) as channel:
        call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(METHOD)
        for _ in range(COUNT):
            data = bad_message(rng)
            code, details = grpc.StatusCode.OK, ""
            try:
                async for _response in call(data, timeout=5.0):
                    pass
            except grpc.aio.AioRpcError as error:
                code, details = error.code(), error.details() or ""
            assert code in CLIENT_FAULTS, (data, code, details)
            assert 10 < len(details) < 400
            assert "Traceback" not in details
        good = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), sampling=pb.SamplingParams(max_tokens=4))
        assert tokens_of(await running.ask(good)) == expected([5, 6], 4)
        started = sum(len(stub.prefills) for stub in running.stubs.values())
        assert started == 2


WRONG_IN_BOTH: dict[str, list[Any]] = {
    "model": ["other", 5, ["tiny"]],
    "temperature": [-1, 2.5, "hot", [], HUGE, {}],
    "top_p": [0, 1.5, "x", -HUGE],
    "n": [0, 17, 1.5, "2", HUGE, -1],
    "seed": ["x", 1.5, HUGE, {}],
    "stop": [5, [5], {"a": 1}, ["x"] * 17, "", ["", "b"], "x" * 300],
    "stream": ["yes", 3],
    "stream_options": ["x", {"include_usage": "maybe"}, {"include_usage": True}],
    "presence_penalty": [3, -3, "x"],
    "frequency_penalty": [3, "x", []],
    "logit_bias": [{"a": 1}, {"5": 101}, {"9999": 1}, {"-1": 1}, [1], {"5": "x"}, {"²": 1}],
    "max_tokens": [0, -1, "x", 300, HUGE, 1.5],
    "top_k": [-2, "x", HUGE],
    "min_p": [2, -1],
    "repetition_penalty": [0, 11],
    "min_tokens": [-1, 200],
    "stop_token_ids": [[259], ["x"], 5, [-1], [HUGE]],
    "priority": [101, "x"],
    "slo_class": ["gold", 5],
}
WRONG_IN_COMPLETIONS: dict[str, list[Any]] = {
    "prompt": [None, "", [], [""], [[]], 5, {"a": 1}, ["a", 5], [[5], "a"], [259], [-1], [1.5], [True]],
    "logprobs": [21, -1, "x", True],
    "echo": ["yes", 1],
    "best_of": [3],
}
WRONG_CONTENT: list[Any] = [[{"type": "image_url", "image_url": {"url": "x"}}], 5, None, {"a": 1}, ["x"]]
WRONG_IN_CHAT: dict[str, list[Any]] = {
    "messages": [
        None,
        "hi",
        [],
        ["hi"],
        [{"content": "x"}],
        [{"role": 5, "content": "x"}],
        [{"role": "pirate", "content": "x"}],
        [{"role": "assistant", "tool_calls": [{}]}],
        [{"role": "user", "content": "x" * 400}],
        *[[{"role": "user", "content": content}] for content in WRONG_CONTENT],
    ],
    "logprobs": ["x", 1],
    "top_logprobs": [2, 21],
    "tools": [[{"a": 1}]],
}


def bad_body(rng: random.Random, chat: bool) -> dict[str, Any]:
    """A JSON body with one field wrong."""
    wrong = {**WRONG_IN_BOTH, **(WRONG_IN_CHAT if chat else WRONG_IN_COMPLETIONS)}
    good: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "ab"}
    field = rng.choice(sorted(wrong))
    return {"model": MODEL, "max_tokens": 4, **good, field: rng.choice(wrong[field])}


async def test_bad_http_requests_are_refused_in_openai_json(folder: Path) -> None:
    rng = random.Random(11)
    raw = [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"prompt": "\xff"}',
        b'{"a": NaN}',
        b"[" * 5000,
        b'{"\\ud800": 1}',
    ]
    async with cluster(folder) as running, httpx.AsyncClient(base_url=running.http) as plain:
        for number in range(COUNT):
            chat = rng.random() < 0.5
            path = "/v1/chat/completions" if chat else "/v1/completions"
            content = rng.choice(raw) if number % 10 == 0 else json.dumps(bad_body(rng, chat)).encode()
            answer = await plain.post(path, content=content)
            assert 400 <= answer.status_code < 500, (path, content, answer.status_code, answer.text)
            error = answer.json()["error"]
            assert 10 < len(error["message"]) < 400, (content, error)
            assert "Traceback" not in answer.text
        good = {"model": MODEL, "prompt": [5, 6], "max_tokens": 4}
        assert (await plain.post("/v1/completions", json=good)).status_code == 200
        assert sum(len(stub.prefills) for stub in running.stubs.values()) == 2
