"""Edge: `tandem bench router`: one router on one core between stub workers and a load, each a process.

The router gets the first core; stubs and load share the others, so what they use limits the figure too and
is reported beside it.
"""

import argparse
import asyncio
import json
import os
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from benchmarks.bench_arguments import check_positive
from benchmarks.processes import START_TIMEOUT_S, exchange, running_module
from benchmarks.relay_load import LoadResult, LoadSpec
from benchmarks.relay_router import RelaySpec
from router.config import RouterConfig
from tandem.ids import Incarnation, WorkerId
from tandem.slo import SloClass
from tandem.worker import Role, WorkerRecord

DIGEST = "stub"
TOKENS_A_STREAM = 32
PROBES = 200
PACED_SHARE = 0.5
STEP_MS = 5.0


def run(chosen: argparse.Namespace) -> int:
    """Prints medians over the runs. Raises TandemError."""
    check_positive({"--streams": chosen.streams, "--seconds": chosen.seconds, "--runs": chosen.runs})
    runs = [asyncio.run(_one_run(chosen.streams, chosen.seconds)) for _ in range(chosen.runs)]
    result = relay_json(runs, chosen.streams)
    print(json.dumps(result) if chosen.json else _text(result))
    return 0


def relay_json(runs: Sequence[LoadResult], streams: int) -> dict[str, Any]:
    """Output of `tandem bench router --json`; the keys are documented in docs/json-output.md."""
    direct = [_p50_ms(run.ttft_direct_s) for run in runs]
    through = [_p50_ms(run.ttft_router_s) for run in runs]
    paced = [_p50_ms(run.ttft_router_paced_s) for run in runs]
    return {
        "benchmark": "router",
        "runs": len(runs),
        "streams": streams,
        "tokens_a_stream": TOKENS_A_STREAM,
        "cores": os.cpu_count(),
        "tokens_per_s": statistics.median(run.tokens_per_s for run in runs),
        "tokens_per_s_each": [run.tokens_per_s for run in runs],
        "ttft_direct_p50_ms": statistics.median(direct),
        "ttft_router_p50_ms": statistics.median(through),
        "ttft_added_p50_ms": statistics.median(b - a for a, b in zip(direct, through, strict=True)),
        "paced_tokens_per_s": statistics.median(run.paced_tokens_per_s for run in runs),
        "paced_ttft_router_p50_ms": statistics.median(paced),
        "router_cpu_share": statistics.median(run.router_cpu_share for run in runs),
        "stubs_cpu_share": statistics.median(run.stubs_cpu_share for run in runs),
        "load_cpu_share": statistics.median(run.load_cpu_share for run in runs),
    }


def _p50_ms(times_s: Sequence[float]) -> float:
    return statistics.median(times_s) * 1e3


def _text(result: dict[str, Any]) -> str:
    return (
        f"{result['tokens_per_s']:,.0f} tokens/s relayed ({result['streams']} streams of "
        f"{result['tokens_a_stream']} tokens, median of {result['runs']} runs)\n"
        f"time to first token, p50: {result['ttft_direct_p50_ms']:.2f} ms at the worker, "
        f"{result['ttft_router_p50_ms']:.2f} ms through the router: "
        f"{result['ttft_added_p50_ms']:.2f} ms added\n"
        f"at {result['paced_tokens_per_s']:,.0f} tokens/s: {result['paced_ttft_router_p50_ms']:.2f} ms\n"
        f"share of a core: router {result['router_cpu_share']:.0%}, stub workers "
        f"{result['stubs_cpu_share']:.0%}, load {result['load_cpu_share']:.0%}"
    )


async def _one_run(streams: int, seconds: float) -> LoadResult:
    cores = sorted(os.sched_getaffinity(0))
    others = set(cores[1:]) or set(cores)
    async with AsyncExitStack() as stack:
        prefill, prefill_process = await stack.enter_async_context(_stub(Role.PREFILL, others))
        decode, decode_process = await stack.enter_async_context(_stub(Role.DECODE, others))
        spec = RelaySpec(_router_config(streams), (prefill, decode), cores[0])
        router = await stack.enter_async_context(running_module("benchmarks.relay_router"))
        port = await exchange(router, spec.to_line())
        load_spec = LoadSpec(
            f"127.0.0.1:{int(port)}",
            prefill.address,
            DIGEST,
            streams,
            TOKENS_A_STREAM,
            seconds,
            PACED_SHARE,
            PROBES,
            router.pid,
            (prefill_process.pid, decode_process.pid),
        )
        load = await stack.enter_async_context(running_module("benchmarks.relay_load", (), others))
        answer = await exchange(load, load_spec.to_line(), timeout_s=START_TIMEOUT_S + 4 * seconds)
        return LoadResult.from_line(answer)


def _router_config(streams: int) -> RouterConfig:
    from engine.models.model_source import resolve_model

    return RouterConfig(
        model_folder=resolve_model("smollm2"),
        model_name="stub",
        digest=DIGEST,
        slo_classes=(SloClass("default", 1.0, 0.1, 1.0),),
        default_slo_class="default",
        context_tokens=2048,
        max_queued=4 * streams + 1024,
        max_active=4 * streams + 4096,
        prefill_window_tokens=1 << 30,
        decode_window_legs=1 << 30,
        grpc_port=0,
        http_port=0,
    )


@asynccontextmanager
async def _stub(
    role: Role, cores: set[int]
) -> AsyncIterator[tuple[WorkerRecord, asyncio.subprocess.Process]]:
    """A stub worker; its tokens are of SmolLM2's vocabulary, which the router's tokenizer knows."""
    arguments = ("--role", role.value, "--digest", DIGEST, "--vocabulary", "49152", "--step-ms", str(STEP_MS))
    async with running_module("benchmarks.stub_worker", arguments, cores) as process:
        facts = json.loads(await exchange(process, b""))
        record = WorkerRecord(
            WorkerId(facts["worker_id"]),
            Incarnation(facts["incarnation"]),
            role,
            facts["address"],
            facts["digest"],
        )
        yield record, process
