"""Edge: `tandem controller run`: a controller by itself, beside a cluster that runs."""

import asyncio
from pathlib import Path

import httpx
import pytest

from cluster.config import REDIS_PASSWORD_ENV
from cluster.config_file import parse_cluster_config
from cluster.controller.assembly import control_cluster
from cluster.embedded_store import embedded_store
from cluster.store import Store, StoreAddress
from tandem.cli.main import main
from tests.cluster.polling import eventually
from tests.e2e.live_cluster import free_port
from tests.router.harness import cluster, write_model_folder

BOUND_S = 30.0
"""The libraries of planning are read first, on a machine that is busy with tests."""

PLAN = """
model: opt-13b
hardware:
  - {device: a100-80g, nodes: 1, devices_per_node: 2}
workload: {prompt_tokens: {mean: 700}, output_tokens: {mean: 200}}
slo: {ttft_s: 1.0, tpot_s: 0.1}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


async def test_it_leads_until_it_ends_and_serves_its_metrics(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, port = write_model_folder(tmp_path), free_port()
    async with cluster(folder) as running, embedded_store(tmp_path / "valkey.log") as server:
        monkeypatch.setenv(REDIS_PASSWORD_ENV, server.password)
        text = f"redis: {{url: '{server.url}'}}\ncontroller: {{plan: {plan}, metrics_port: {port}}}"
        store = Store(StoreAddress(server.url, password=server.password))
        controlling = asyncio.create_task(
            control_cluster(parse_cluster_config(text, "f"), [running.grpc], print)
        )

        async def leads() -> bool:
            return not await store.lead("another", 0.001)

        await eventually(leads, BOUND_S)
        async with httpx.AsyncClient() as http:

            async def shown() -> bool:
                page = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
                return "tandem_controller_leading 1.0" in page

            await eventually(shown, BOUND_S)
        controlling.cancel()
        assert await controlling == 0
        assert await store.lead("another", 60.0)
        await store.close()


async def test_a_dry_run_needs_no_registry_and_says_each_window(plan: Path, tmp_path: Path) -> None:
    said: list[str] = []
    text = f"controller: {{plan: {plan}, dry_run: true, window_s: 0.05}}"
    async with cluster(write_model_folder(tmp_path)) as running:
        controlling = asyncio.create_task(
            control_cluster(parse_cluster_config(text, "f"), [running.grpc], said.append)
        )

        async def three_windows() -> bool:
            return len(said) >= 3

        await eventually(three_windows, BOUND_S)
        controlling.cancel()
        assert await controlling == 0
    assert said[0] == "1 prefill + 1 decode, 0 req/s: nothing, nothing came"


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("controller: {{}}", "controller.plan: a controller needs one"),
        ("controller: {{plan: {plan}}}", "redis.url: the embedded one is known to its `tandem up` alone"),
    ],
)
def test_what_nobody_could_control_by_is_refused(
    section: str, sentence: str, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(section.format(plan=plan))
    assert main(["controller", "run", "-f", str(path)]) == 2
    assert sentence in capsys.readouterr().err
