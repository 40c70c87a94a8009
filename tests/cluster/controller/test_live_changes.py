"""A live cluster whose workers change their roles, come and go while it serves; nobody's answer changes."""

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.launch import RunningCluster
from planner.control.load_window import RolePlacement
from tandem.cli.main import main
from tandem.client import AsyncTandemClient
from tests.cluster.controller.tiny_cluster import Load, save_model, tiny_cluster, until_placed
from tests.cluster.polling import eventually
from tests.planner.profiles import profile_document

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LONG_ANSWER = 1200
READING = [list(range(3, 203)) * 7]
"""1,400 tokens, for which the plan's prefill worker takes about a second."""

PLAN = """
model:
  {name: tiny, layers: 3, hidden: 32, heads: 4, kv_heads: 2, head_dim: 8, intermediate: 48, vocabulary: 259}
hardware:
  - device: cpu-2-cores
    nodes: 1
    devices_per_node: 3
    latency: {kind: profile, file: profile.json}
workload: {prompt_tokens: {mean: 500}, output_tokens: {mean: 50}}
slo: {ttft_s: 60, tpot_s: 60}
"""

CONTROLLER = """
leases: {{registry_s: 1.0}}
controller:
  enabled: true
  plan: {folder}/plan.yaml
  log: {folder}/controller.jsonl
  window_s: 1
  patience: 1
  dwell_s: 600
"""


@pytest.fixture
def short_temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray keeps Unix sockets in it; logs go elsewhere."""
    monkeypatch.setattr(tempfile, "tempdir", tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setenv("TANDEM_RUN_DIR", str(tmp_path))


@asynccontextmanager
async def load_on(cluster: RunningCluster) -> AsyncIterator[Load]:
    load = Load(cluster)
    try:
        yield load
    finally:
        await load.close()


@asynccontextmanager
async def reading(load: Load) -> AsyncIterator[None]:
    """Three long prompts a second, until the end of the block; every answer must come, always the same."""
    answers: list[asyncio.Task[list[list[int]]]] = []

    async def ask() -> None:
        while True:
            answers.append(asyncio.create_task(load.answers(READING, 4)))
            await asyncio.sleep(0.3)

    asking = asyncio.create_task(ask())
    try:
        yield
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    found = await asyncio.gather(*answers)
    assert all(answer == found[0] for answer in found)
    assert len(found) > 2


@asynccontextmanager
async def without_registry() -> AsyncIterator[None]:
    """Valkey doesn't answer until the end of the block."""
    (registry,) = (one for one in psutil.Process().children(recursive=True) if "valkey" in one.name())
    os.kill(registry.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(registry.pid, signal.SIGCONT)


async def wanted(cluster: RunningCluster) -> RolePlacement | None:
    desired = await cluster.store.desired()
    return None if desired is None else desired.placement


async def test_load_that_shifts_to_prompts_turns_a_decode_worker_into_a_prefill_worker(
    tmp_path: Path, short_temporary: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "profile.json").write_text(json.dumps(profile_document()))
    (tmp_path / "model").mkdir()
    settings = CONTROLLER.format(folder=tmp_path)
    writing = [[40 + number, 50, 60] * 5 for number in range(6)]
    async with tiny_cluster(save_model(tmp_path / "model"), settings) as cluster, load_on(cluster) as load:
        undisturbed = await load.answers(writing, LONG_ANSWER)
        async with reading(load):
            async with without_registry():
                assert await load.answers(READING, 4)
                await asyncio.sleep(2.0)
            running = asyncio.create_task(load.answers(writing, LONG_ANSWER))
            await until_placed(cluster, RolePlacement(2, 1))
            await eventually(lambda: _shows(cluster, 2, 1), 10.0)
        assert await wanted(cluster) == RolePlacement(2, 1)
        assert await running == undisturbed

        running = asyncio.create_task(load.answers(writing, LONG_ANSWER))
        await cluster.store.set_desired(RolePlacement(2, 2))
        await until_placed(cluster, RolePlacement(2, 2))
        await cluster.store.set_desired(RolePlacement(1, 1))
        await until_placed(cluster, RolePlacement(1, 1))
        assert await running == undisturbed
    assert main(["controller", "replay", f"{tmp_path}/controller.jsonl", "-f", f"{tmp_path}/plan.yaml"]) == 0
    assert "flip decode to prefill x 1" in capsys.readouterr().out


async def _shows(cluster: RunningCluster, prefill: int, decode: int) -> bool:
    """Whether `tandem status` and the metrics show so many wanted and there."""
    async with AsyncTandemClient(cluster.grpc_address) as client:
        status = await client.status()
    async with httpx.AsyncClient() as http:
        metrics = (await http.get(f"http://{cluster.http_address}/metrics")).text
    counts = [(count.desired, count.actual) for count in status.roles]
    gauge = f'tandem_workers{{role="prefill",state="desired"}} {prefill}.0'
    return counts == [(prefill, prefill), (decode, decode)] and gauge in metrics
