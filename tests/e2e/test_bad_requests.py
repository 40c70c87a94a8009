"""Over 400 bad requests on both APIs: each gets a clear refusal, and the cluster goes on."""

import json
import random
import string
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc
from tests.e2e.conftest import settings
from tests.e2e.live_cluster import LiveCluster, live_cluster

pytestmark = pytest.mark.e2e

TRACES = ("Traceback", 'File "', '", line ', ".py")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCluster]:
    """One prefill and one decode worker."""
    with live_cluster(tmp_path_factory.mktemp("bad"), settings("shm", 1)) as running:
        yield running


def _bad_bodies() -> list[tuple[str, bytes]]:
    """(path, body) pairs that are wrong in one way each."""
    draw = random.Random(7)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    text = {"prompt": "hi", "max_tokens": 2}
    wrong: list[Any] = ["x", [], {}, [[]], 1e308, -1, 10**30, "NaN", -(10**30), [None], {"a": 1}]
    valid = {("presence_penalty", -1), ("frequency_penalty", -1), ("seed", -1)}
    numeric = ("temperature", "top_p", "max_tokens", "n", "presence_penalty", "frequency_penalty", "seed")
    bodies: list[tuple[str, Any]] = []
    for key in numeric:
        for value in wrong:
            if isinstance(value, int) and (key, value) in valid:
                continue
            bodies.append(("chat/completions", {**chat, key: value}))
            bodies.append(("completions", {**text, key: value}))
    refused: dict[tuple[str, str], tuple[Any, ...]] = {
        ("chat/completions", "messages"): (
            *("hi", [], [1], [{"role": "user"}], [{"role": "nobody", "content": "x"}], {}, None, 5),
        ),
        ("completions", "prompt"): (
            *([], {}, 5, [-1], [10**12], [["a"]], "", [49152], [1.5], "word " * 9000),
        ),
        ("completions", "stop"): (5, [5], ["x"] * 50, {"a": 1}, ["y" * 5000]),
        ("completions", "logit_bias"): (5, {"x": 1}, {"5": "y"}, {"5": 1e9}, ["a"]),
    }
    for (path, key), values in refused.items():
        base = chat if path.startswith("chat") else text
        bodies.extend((path, {**base, key: value}) for value in values)
    encoded = [(path, json.dumps(body).encode()) for path, body in bodies]
    for _ in range(30):
        junk = "".join(draw.choices(string.printable, k=draw.randint(0, 60))).encode()
        encoded.append((draw.choice(["completions", "chat/completions"]), junk))
    encoded.append(("completions", b'{"prompt": "\xff\xfe", "max_tokens": 2}'))
    encoded.append(("completions", b"\x00" * 100))
    return encoded


def test_bad_http_requests_get_openai_errors(cluster: LiveCluster) -> None:
    bodies = _bad_bodies()
    assert len(bodies) >= 200
    with httpx.Client(base_url=f"http://{cluster.http_address}", timeout=60.0) as client:
        for path, body in bodies:
            answer = client.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
            assert 400 <= answer.status_code < 500, f"{answer.status_code} for {body[:200]!r}"
            error = answer.json()["error"]
            assert error["message"]
            assert {"message", "type", "param", "code"} <= error.keys()
            assert not any(trace in error["message"] for trace in TRACES), error["message"]
        assert client.get("/v1/nothing").status_code == 404
        assert client.get("/v1/completions").status_code == 405
        good = client.post("/v1/completions", json={"prompt": "One, two,", "max_tokens": 2})
        assert good.status_code == 200


def _bad_grpc_requests() -> list[pb.GenerateRequest]:
    ids = pb.TokenIds(ids=[5, 6, 7])
    out_of_range: dict[str, list[Any]] = {
        "temperature": [-0.1, 2.1, 1e300, float("nan"), float("inf"), float("-inf")],
        "top_p": [0.0, -1.0, 1.1, float("nan"), 1e308],
        "min_p": [-0.1, 1.1, float("nan")],
        "presence_penalty": [-2.1, 2.1, float("nan")],
        "frequency_penalty": [-2.1, 2.1, float("inf")],
        "repetition_penalty": [0.0, -1.0, 10.1, float("nan")],
        "n": [0, 17, 4_000_000_000],
        "logprobs": [21, 4_000_000_000],
        "max_tokens": [0],
    }
    requests = [
        pb.GenerateRequest(token_ids=ids, sampling=pb.SamplingParams(**{key: value}))
        for key, values in out_of_range.items()
        for value in values
    ]
    requests += [
        pb.GenerateRequest(),
        pb.GenerateRequest(text=""),
        pb.GenerateRequest(token_ids=pb.TokenIds()),
        pb.GenerateRequest(chat=pb.ChatPrompt()),
        pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="x", content="y")])),
        pb.GenerateRequest(token_ids=ids, slo_class="none-such"),
        pb.GenerateRequest(token_ids=ids, timeout_s=-1),
        pb.GenerateRequest(token_ids=ids, timeout_s=float("nan")),
        pb.GenerateRequest(token_ids=ids, priority=101),
        pb.GenerateRequest(token_ids=ids, priority=-101),
        pb.GenerateRequest(token_ids=ids, sampling=pb.SamplingParams(stop=[""])),
        pb.GenerateRequest(token_ids=ids, sampling=pb.SamplingParams(stop=["x"] * 17)),
        pb.GenerateRequest(token_ids=ids, sampling=pb.SamplingParams(stop=["x" * 257])),
        pb.GenerateRequest(token_ids=ids, sampling=pb.SamplingParams(stop_token_ids=[1] * 65)),
        pb.GenerateRequest(token_ids=ids, sampling=pb.SamplingParams(logit_bias={5: 101.0})),
        pb.GenerateRequest(token_ids=ids, sampling=pb.SamplingParams(logit_bias={5: float("nan")})),
        pb.GenerateRequest(token_ids=ids, sampling=pb.SamplingParams(min_tokens=9, max_tokens=8)),
        pb.GenerateRequest(text="word " * 9000),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 8193)),
        pb.GenerateRequest(token_ids=ids, resume=[pb.ResumePoint(sample_index=3)]),
    ]
    draw = random.Random(8)
    for _ in range(130):
        bad_id = "".join(draw.choices(" /\\\n\té☃$", k=draw.randint(1, 150)))
        requests.append(pb.GenerateRequest(token_ids=ids, request_id=bad_id))
    for _ in range(30):
        bad = draw.randint(49152, 2**32 - 1)
        requests.append(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, bad])))
    return requests


def test_bad_grpc_requests_get_invalid_argument(cluster: LiveCluster) -> None:
    requests = _bad_grpc_requests()
    assert len(requests) >= 200
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for request in requests:
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(request, timeout=60.0))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, request
            details = caught.value.details() or ""
            assert details
            assert not any(trace in details for trace in TRACES), details
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(text="x", model="none-such"), timeout=60.0))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        raw: Any = channel.unary_stream("/tandem.v1.InferenceService/Generate")
        with pytest.raises(grpc.RpcError):
            list(raw(b"\xff\xff\xff\xff", timeout=60.0))
        good = pb.GenerateRequest(text="One, two,", sampling=pb.SamplingParams(max_tokens=2))
        assert list(stub.Generate(good, timeout=60.0))


def test_a_prompt_over_the_context_names_both_numbers(cluster: LiveCluster) -> None:
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 9000)), timeout=60.0))
    assert "9000" in (caught.value.details() or "")
    assert "8192" in (caught.value.details() or "")
    cluster.wait_until_blocks_are_accounted()
