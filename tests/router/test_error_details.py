"""The details of a gRPC error that clients rely on, and who may call at all."""

from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_status import rpc_status

from benchmarks.stub_script import StubSettings
from router.inference_service import InferenceService
from tandem.errors import InvalidRequest, NotReady, Overloaded, TandemError, UnknownModel
from tandem.grpc_edge import status_of
from tandem.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2_grpc
from tandem.v1 import inference_pb2 as pb
from tests.router.harness import Cluster, cluster, router_alone, tokens_of, until

QUESTION = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[10, 20]), sampling=pb.SamplingParams(max_tokens=3))


MessageT = TypeVar("MessageT", bound=Message)


def detail(status: status_pb2.Status, kind: type[MessageT]) -> MessageT | None:
    """The detail of that kind, if the status has one."""
    found = kind()
    return found if any(packed.Unpack(found) for packed in status.details) else None


async def refusal(address: str, metadata: tuple[tuple[str, str], ...] = ()) -> status_pb2.Status:
    """The status with which a question is refused."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            [_ async for _ in stub.Generate(QUESTION, metadata=metadata, timeout=10.0)]
        return rpc_status.from_call(_AsCall(refused.value))


class _AsCall:
    """grpc_status reads details from a call; an AioRpcError has the same facts."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.details, self.trailing_metadata = error.code, error.details, error.trailing_metadata


async def calls(running: Cluster, code: str) -> float:
    """How often a gRPC call ended so, by the metrics."""
    return running_total(await running.metrics(), f'tandem_calls_total{{api="grpc",code="{code}"}}')


def running_total(text: str, name: str) -> float:
    """A sample of the metrics' text; 0 when it is not there."""
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)


@pytest.mark.parametrize(
    ("error", "retry_s"),
    [
        (InvalidRequest("Wrong.", "field"), None),
        (UnknownModel("No such model."), None),
        (NotReady("Later."), 1),
        (Overloaded("Full.", 2.5), 3),
    ],
)
def test_every_error_names_its_reason_and_some_when_to_come_back(
    error: TandemError, retry_s: int | None
) -> None:
    status = status_of(error)
    info = detail(status, error_details_pb2.ErrorInfo)
    assert info is not None
    assert (info.reason, info.domain) == (type(error).__name__, "tandem")
    retry = detail(status, error_details_pb2.RetryInfo)
    assert (None if retry is None else retry.retry_delay.seconds) == retry_s


async def test_unready_router_says_when_to_come_back(folder: Path) -> None:
    async with router_alone(folder, park_requests_s=0.1) as running:
        status = await refusal(running.grpc)
    assert status.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert detail(status, error_details_pb2.RetryInfo) is not None


async def test_call_without_the_token_is_told_how_to_send_it_and_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_API_KEY", "secret")
    async with cluster(folder) as running:
        for metadata in ((), (("authorization", "Bearer other"),), (("authorization", "Basic secret"),)):
            status = await refusal(running.grpc, metadata)
            assert status.code == grpc.StatusCode.UNAUTHENTICATED.value[0]
            assert "authorization: Bearer" in status.message
            info = detail(status, error_details_pb2.ErrorInfo)
            assert info is not None
            assert info.reason == "Unauthenticated"
        assert await calls(running, "UNAUTHENTICATED") == 3
        async with grpc.aio.insecure_channel(running.grpc) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            for scheme in ("bearer", "BEARER"):
                call = stub.Generate(QUESTION, metadata=(("authorization", f"{scheme} secret"),))
                assert tokens_of([response async for response in call])


async def test_unexpected_error_tells_the_client_nothing_but_its_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_args: object) -> pb.GenerateResponse:
        raise RuntimeError("private words")

    monkeypatch.setattr(InferenceService, "_response", fails)
    async with cluster(folder) as running:
        status = await refusal(running.grpc)
        assert await calls(running, "INTERNAL") == 1
    assert "private" not in str(status)
    assert detail(status, error_details_pb2.ErrorInfo) is not None


async def test_cancelled_calls_and_late_ones_are_counted(folder: Path) -> None:
    async with cluster(folder, StubSettings(step_s=0.05)) as running:
        long = pb.GenerateRequest(text="ab", sampling=pb.SamplingParams(max_tokens=200, ignore_eos=True))
        async with grpc.aio.insecure_channel(running.grpc) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            left = stub.Generate(long)
            await left.read()
            left.cancel()
            late = stub.Generate(long, timeout=0.3)
            with pytest.raises(grpc.aio.AioRpcError):
                [_ async for _ in late]

        async def counted() -> bool:
            ends = [await calls(running, code) for code in ("CANCELLED", "DEADLINE_EXCEEDED", "OK")]
            return ends == [1, 1, 0]

        await until(counted, within_s=3.0)


async def test_health_is_told_for_both_services(folder: Path) -> None:
    async with cluster(folder) as running, grpc.aio.insecure_channel(running.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        names = ("", "tandem.v1.InferenceService", "tandem.v1.ClusterService")

        async def all_serve() -> bool:
            answers = [await health.Check(health_pb2.HealthCheckRequest(service=name)) for name in names]
            return all(answer.status == health_pb2.HealthCheckResponse.SERVING for answer in answers)

        await until(all_serve)
        assert (await cluster_pb2_grpc.ClusterServiceStub(channel).Status(cluster_pb2.StatusRequest())).ready


async def test_developer_is_another_name_of_the_system_role(folder: Path) -> None:
    async with cluster(folder) as running:
        prompts = []
        for role in ("system", "developer"):
            chat = pb.ChatPrompt(messages=[pb.ChatMessage(role=role, content="be brief")])
            await running.ask(pb.GenerateRequest(chat=chat, sampling=pb.SamplingParams(max_tokens=1)))
            prompts.append(list(running.stubs["p0"].prefills[-1].token_ids))
    assert prompts[0] == prompts[1]
