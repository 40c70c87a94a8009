"""Edge: whole clusters started in this process: restarts, faults at the start, nothing left at the end."""

import asyncio
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.config import ClusterConfig
from cluster.config_file import parse_cluster_config
from cluster.launch import RunningCluster, running_cluster
from tandem.client import AsyncTandemClient, GenerateOptions
from tandem.errors import ConfigError, ModelError, NotReady
from tandem.generation import SamplingOptions
from tandem.ids import WorkerId
from tests.cluster.polling import eventually

FREE_PORTS = "router: {grpc_port: 0, http_port: 0}\n"
RESTART_BOUND_S = 5.0 + 15.0
"""5 s, and the model's load with its imports on a machine that is busy with tests."""


def config(text: str = "") -> ClusterConfig:
    return parse_cluster_config(FREE_PORTS + text, "test")


@pytest.fixture(autouse=True)
def leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, temporary file or variable may be left by a test."""
    monkeypatch.setenv("TANDEM_RUN_DIR", str(tmp_path))
    # Short, since Ray keeps Unix sockets in it.
    temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    variables, children = _our_variables(), set(psutil.Process().children(recursive=True))
    yield
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - children, timeout=5.0)
    assert not alive
    assert _our_variables() == variables
    temporary.rmdir()


def _our_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("TANDEM_")}


async def test_wrong_model_is_said_at_once() -> None:
    started_s = time.monotonic()
    with pytest.raises(ModelError, match="/no/such/model"):
        async with running_cluster(config("model: {source: /no/such/model}")):
            pytest.fail("the cluster must not start")
    assert time.monotonic() - started_s < 10.0


async def test_a_core_that_the_machine_lacks_is_said_at_once() -> None:
    missing = max(os.sched_getaffinity(0)) + 1000
    with pytest.raises(ConfigError, match=rf"pools\.decode\.cores: {missing} is not to be had .* allowed: "):
        async with running_cluster(config(f"pools: {{decode: {{cores: [{missing}]}}}}")):
            pytest.fail("the cluster must not start")


async def test_unreachable_registry_is_said_at_once() -> None:
    with pytest.raises(NotReady, match=r"redis://127\.0\.0\.1:1/0"):
        async with running_cluster(config("redis: {url: 'redis://127.0.0.1:1/0'}")):
            pytest.fail("the cluster must not start")


async def test_taken_port_is_said_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"router\.http_port: 127\.0\.0\.1:{port} cannot be bound"):
            async with running_cluster(
                parse_cluster_config(f"router: {{grpc_port: 0, http_port: {port}}}", "f")
            ):
                pytest.fail("the cluster must not start")


async def test_other_ray_needs_a_token_that_its_nodes_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_CLUSTER_TOKEN", raising=False)
    elsewhere = config("ray: {address: 'ray://127.0.0.1:1'}\nredis: {url: 'redis://127.0.0.1:1/0'}")
    with pytest.raises(ConfigError, match="TANDEM_CLUSTER_TOKEN"):
        async with running_cluster(elsewhere):
            pytest.fail("the cluster must not start")


async def _one_answer(cluster: RunningCluster) -> list[int]:
    options = GenerateOptions(SamplingOptions(max_tokens=4, temperature=0.0), timeout_s=60.0)
    async with AsyncTandemClient(cluster.grpc_address) as client:
        updates = [update async for update in client.generate("One, two, three,", options)]
    return [token for update in updates for delta in update.deltas for token in delta.token_ids]


@pytest.mark.e2e
async def test_killed_worker_serves_again_under_a_new_incarnation(tmp_path: Path) -> None:
    victim = WorkerId("decode-0")
    async with running_cluster(config()) as cluster:
        answer = await _one_answer(cluster)
        assert len(answer) == 4
        before = await cluster.workers()
        assert set(before) == {"prefill-0", "decode-0"}
        os.kill(before[victim].pid, signal.SIGKILL)
        killed_s = time.monotonic()

        async def is_back() -> bool:
            found = (await cluster.workers()).get(victim)
            return found is not None and found.record.incarnation > before[victim].record.incarnation

        await eventually(is_back, 60.0)
        assert time.monotonic() - killed_s < RESTART_BOUND_S
        assert await _one_answer(cluster) == answer
        secrets = _secrets_of(cluster)
    assert not _files_with(secrets, tmp_path)


def _secrets_of(cluster: RunningCluster) -> list[bytes]:
    environment = psutil.Process(cluster.router.pid).environ()
    return [environment[name].encode() for name in ("TANDEM_CLUSTER_TOKEN", "TANDEM_REDIS_PASSWORD")]


def _files_with(secrets: list[bytes], folder: Path) -> list[Path]:
    files = list(folder.iterdir())
    assert len(files) >= 4
    return [path for path in files if any(secret in path.read_bytes() for secret in secrets)]


@pytest.mark.e2e
async def test_worker_that_cannot_start_is_named_with_its_log() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = f"pools: {{prefill: {{metrics_port: {port}}}}}"
        with pytest.raises(NotReady, match=r"prefill-0 failed 3 times, last with: .*in use") as caught:
            async with running_cluster(config(text)):
                pytest.fail("the cluster must not start")
    assert "worker ended" in str(caught.value)


@pytest.mark.e2e
@pytest.mark.parametrize("after_s", [0.3, 3.0, 8.0])
async def test_start_that_is_interrupted_leaves_nothing(after_s: float) -> None:
    async def start() -> None:
        async with running_cluster(config()):
            await asyncio.sleep(60)

    task = asyncio.create_task(start())
    await asyncio.wait({task}, timeout=after_s)
    task.cancel()
    async with asyncio.timeout(40):
        with pytest.raises(asyncio.CancelledError):
            await task
