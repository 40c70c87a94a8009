"""The clients that users bring: the openai package, curl, and a gRPC client made from the .proto alone."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from tests.e2e.conftest import MAX_TOKENS, Expectation, settings
from tests.e2e.live_cluster import LiveCluster, live_cluster
from tests.e2e.reference import Reference

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(
    expectations: list[Expectation], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveCluster]:
    """One prefill and one decode worker."""
    with live_cluster(tmp_path_factory.mktemp("clients"), settings("shm", 1)) as running:
        yield running


@pytest.fixture
def client(cluster: LiveCluster) -> openai.OpenAI:
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"http://{cluster.http_address}/v1", api_key="unused", max_retries=0)


def _text(reference: Reference, expected: Expectation) -> str:
    return str(reference.tokenizer.decode(expected.greedy, skip_special_tokens=True))


def test_openai_chat_completion(
    client: openai.OpenAI, expectations: list[Expectation], reference: Reference
) -> None:
    model = client.models.list().data[0].id
    for expected in expectations[:4]:
        messages: Any = expected.messages
        answer = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_completion_tokens=MAX_TOKENS
        )
        assert answer.choices[0].message.content == _text(reference, expected)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(expected.prompt)
        assert answer.usage.completion_tokens == len(expected.greedy)
        ended = "stop" if expected.greedy[-1] == 2 else "length"
        assert answer.choices[0].finish_reason == ended


def test_openai_chat_stream_with_usage(
    client: openai.OpenAI, expectations: list[Expectation], reference: Reference
) -> None:
    expected = expectations[5]
    messages: Any = expected.messages
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == _text(reference, expected)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.greedy)


def test_openai_completion_with_stop_logprobs_and_n(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    whole = client.completions.create(model=model, prompt="One, two, three,", temperature=0, max_tokens=24)
    stop = whole.choices[0].text[6:9]
    cut = client.completions.create(
        model=model, prompt="One, two, three,", temperature=0, max_tokens=24, stop=[stop], logprobs=2, n=2
    )
    for choice in cut.choices:
        assert choice.text == whole.choices[0].text[: whole.choices[0].text.index(stop)]
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert all(value is not None and value <= 0 for value in choice.logprobs.token_logprobs)
    assert [choice.index for choice in cut.choices] == [0, 1]


def test_openai_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="x")
    model = client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError, match=r"8192.*|.*9000"):
        client.completions.create(model=model, prompt=[5] * 9000)


def test_curl_streams_server_sent_events(cluster: LiveCluster) -> None:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 16,
            "stream": True,
        }
    )
    command = ["curl", "-sN", f"http://{cluster.http_address}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    events = [line for line in done.stdout.decode().split("\n\n") if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    parts = [json.loads(event[6:])["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(parts) == "The capital of France is Paris."


def test_a_client_made_from_the_proto_alone(
    cluster: LiveCluster, expectations: list[Expectation], tmp_path: Path
) -> None:
    proto = tmp_path / "inference.proto"
    text = (ROOT / "protos/tandem/v1/inference.proto").read_text()
    # Another package name, since one process can't register the same messages twice.
    proto.write_text(text.replace("package tandem.v1;", "package other.name;"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(tmp_path)]
    subprocess.run(
        [*command, f"--python_out={tmp_path}", str(proto)], check=True, timeout=60, capture_output=True
    )
    sys.path.insert(0, str(tmp_path))
    try:
        pb = importlib.import_module("inference_pb2")
    finally:
        sys.path.remove(str(tmp_path))
    expected = expectations[0]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=expected.prompt),
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS),
    )
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        call = channel.unary_stream(
            "/tandem.v1.InferenceService/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        responses = list(call(request, timeout=60.0))
    tokens = [token for response in responses for chunk in response.chunks for token in chunk.token_ids]
    assert tokens == expected.greedy
    assert responses[-1].timeline.ttft_s > 0


def test_metrics_and_status_tell_what_happened(cluster: LiveCluster) -> None:
    metrics = httpx.get(f"http://{cluster.http_address}/metrics", timeout=10.0).text
    for name in ("ttft", "tpot", "itl", "queue", "prefill", "handoff", "goodput"):
        assert name in metrics
    status = cluster.status()
    assert status.ready
    assert {worker.worker.worker_id for worker in status.workers} == {"prefill-0", "decode-0"}
    command = [sys.executable, "-m", "tandem.cli.main", "status", "--json", "--address", cluster.grpc_address]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    workers = json.loads(done.stdout)["workers"]
    assert len(workers) == 2
    for worker in workers:
        text = httpx.get(f"http://{worker['metrics_address']}/metrics", timeout=10.0).text
        assert 'tandem_worker_kv_blocks{state="unaccounted"} 0.0' in text
        assert "tandem_worker_step_seconds_count" in text
    cluster.wait_until_blocks_are_accounted()
