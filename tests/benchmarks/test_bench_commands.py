"""Edge: the benchmarks as a person runs them: real router, stub workers, both APIs, JSON out."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stub_script import StubSettings
from benchmarks.stub_worker import StubWorker
from engine.models.model_source import resolve_model
from router.config import RouterConfig
from router.membership import FixedMembership
from router.server import RouterPorts, serve_router
from tandem.cli.main import main
from tandem.slo import SloClass
from tandem.worker import Role

SETTINGS = StubSettings(vocabulary_tokens=49_152, prefill_s=0.02, step_s=0.005)
TRACE = """arrived_at,num_prefill_tokens,num_decode_tokens
0.0,374,44
4.314579,396,109
4.541877,879,55
4.710427,91,16
"""
"""First rows of the Azure LLM inference trace 2023 (microsoft/vidur's form, MIT)."""


def router_config(max_queued: int) -> RouterConfig:
    return RouterConfig(
        model_folder=resolve_model("smollm2"),
        model_name="stub",
        digest="stub",
        slo_classes=(SloClass("fast", 2.0, 0.5, 2.0), SloClass("hopeless", 1e-6, 0.5, 2.0)),
        default_slo_class="fast",
        context_tokens=512,
        max_queued=max_queued,
        canary_interval_s=1.0,
        grpc_port=0,
        http_port=0,
    )


@asynccontextmanager
async def running_router(max_queued: int = 256) -> AsyncIterator[RouterPorts]:
    stop = asyncio.Event()
    ports: asyncio.Future[RouterPorts] = asyncio.get_running_loop().create_future()
    async with (
        StubWorker.serving(Role.PREFILL, "p", "stub", SETTINGS) as prefill,
        StubWorker.serving(Role.DECODE, "d", "stub", SETTINGS) as decode,
        asyncio.TaskGroup() as tasks,
    ):
        membership = FixedMembership([prefill.record, decode.record])
        tasks.create_task(serve_router(router_config(max_queued), membership, stop, ports.set_result))
        try:
            async with asyncio.timeout(30):
                yield await ports
        finally:
            stop.set()


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    output: str
    errors: str

    @property
    def result(self) -> dict[str, Any]:
        """What `--json` printed."""
        parsed: dict[str, Any] = json.loads(self.output)
        return parsed


async def bench_serve(ports: RouterPorts, *arguments: str) -> Finished:
    """Runs the command as a person does, in a process of its own."""
    where = (
        "--address",
        f"127.0.0.1:{ports.grpc_port}",
        "--http-address",
        f"127.0.0.1:{ports.http_port}",
    )
    command = (sys.executable, "-m", "tandem.cli.main", "bench", "serve", *where, "--json", *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Finished(process.returncode or 0, output.decode(), errors.decode())


@pytest.mark.parametrize("api", ["grpc", "http"])
async def test_trace_is_offered_over_both_apis(api: str, tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text(TRACE)
    limits = ("--rate", "20", "--length-scale", "0.5", "--max-output-tokens", "8")
    async with running_router() as ports:
        finished = await bench_serve(ports, "--api", api, "--trace", str(trace), *limits)
    assert finished.code == 0, finished.errors
    result = finished.result
    assert (result["offered"], result["completed"], result["failed"]) == (4, 4, 0)
    assert result["load"] == {
        "api": api,
        "trace": "azure.csv",
        "arrivals": "trace",
        "rate_rps": 20.0,
        "limit": 100,
        "length_scale": 0.5,
        "max_output_tokens": 8,
        "seed": 0,
    }
    assert result["output_tokens_per_s"] * result["duration_s"] == pytest.approx(4 * 8)
    assert result["ttft_s"]["p50"] >= SETTINGS.prefill_s
    (fast,) = result["classes"]
    assert (fast["name"], fast["good"], fast["attainment"]) == ("fast", 4, 1.0)


async def test_classes_are_counted_apart() -> None:
    load = ("--rate", "40", "--limit", "20", "--output-tokens", "4", "--prompt-tokens", "10")
    shares = ("--class", "fast=1", "--class", "hopeless=1", "--seed", "3")
    async with running_router() as ports:
        finished = await bench_serve(ports, *load, *shares)
    assert finished.code == 0, finished.errors
    classes = {entry["name"]: entry for entry in finished.result["classes"]}
    assert classes["fast"]["offered"] + classes["hopeless"]["offered"] == 20
    assert classes["fast"]["good"] == classes["fast"]["offered"] > 0
    assert classes["hopeless"]["good"] == 0 < classes["hopeless"]["offered"]


WRONG = {
    (): "Without --trace, --rate is needed",
    ("--rate", "1", "--class", "none=1"): "Unknown SLO class 'none'; known: fast, hopeless",
    ("--rate", "1", "--class", "fast"): "--class 'fast': expected NAME= and 1 number(s)",
    ("--rate", "1", "--slo", "fast=1,2"): "--slo 'fast=1,2': expected NAME= and 3 number(s)",
    ("--rate", "1", "--api", "http", "--http-address", "here:there"): "'here:there' is no HOST:PORT",
    ("--rate", "-1"): "rate must be positive",
    ("--rate", "1", "--limit", "0"): "--limit must be positive",
    ("--trace", "/no/trace.csv"): "/no/trace.csv: cannot be read",
}


async def test_wrong_load_is_refused_with_a_sentence() -> None:
    async with running_router() as ports:
        for arguments, message in WRONG.items():
            finished = await bench_serve(ports, *arguments)
            assert finished.code == 2, arguments
            assert message in finished.errors
            assert "Traceback" not in finished.errors


@pytest.mark.e2e
def test_relay_is_measured_with_processes_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "router", "--runs", "1", "--seconds", "1", "--streams", "16", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["tokens_per_s"] > 1000
    assert result["ttft_router_p50_ms"] > 0
    assert len(result["tokens_per_s_each"]) == result["runs"] == 1
