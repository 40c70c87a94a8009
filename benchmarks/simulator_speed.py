"""Edge: `tandem bench sim`: how many requests a second one core simulates, beside the bar."""

import argparse
import json
import random
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from benchmarks.bench_arguments import check_positive
from planner.simulation.records import Records
from planner.simulation.setup import Drive, RouterRules, Setup, SimRole, WorkerSpec
from planner.simulator import simulate
from planner.step_times.hardware import device_named
from planner.step_times.model_shape import kv_capacity_tokens, model_named
from planner.step_times.roofline import Layout, Roofline
from planner.step_times.transfer_links import LinkTransfer, link_of_rate
from planner.workloads.arrivals import ArrivalProcess, arrival_times_s
from planner.workloads.trace_file import read_trace_file
from planner.workloads.traces import TraceRow
from planner.workloads.workload import Lognormal, SimRequest, lognormal_lengths, rate_scaled, requests
from tandem.ids import WorkerId
from tandem.slo import SloClass

BAR_PER_S = 10_000
"""Requests a second and core that the simulator must reach (issue 5)."""

REQUESTS = 19_366
"""Those of the Azure conversation trace."""

WORKERS_A_ROLE = 4
OBJECTS_SHARE = 0.2
"""Share of the requests that the full objects are timed on."""

_LIKE_AZURE = (Lognormal(1155.0, 0.96, 14_000), Lognormal(211.0, 0.77, 1000))
"""Means and variations of the Azure conversation trace of 2023, for a run without it."""


def run(chosen: argparse.Namespace) -> int:
    """Prints medians over the runs. Raises ConfigError, InvalidRequest."""
    count = REQUESTS if chosen.requests is None else chosen.requests
    check_positive({"--requests": count, "--runs": chosen.runs, "--rate": chosen.rate})
    rows = None if chosen.trace is None else read_trace_file(chosen.trace, None)
    result = measure(rows, count, chosen.rate, chosen.runs)
    print(json.dumps(result) if chosen.json else _text(result))
    return 0


def measure(rows: Sequence[TraceRow] | None, count: int, rate_rps: float, runs: int) -> dict[str, Any]:
    """Output of `tandem bench sim --json`; the keys are documented in docs/json-output.md."""
    setup = eight_workers()
    timed = [_timed(setup, _requests(rows, count, rate_rps)) for _ in range(runs)]
    part = max(1, round(count * OBJECTS_SHARE))
    objects, _ = _timed(replace(setup, drive=Drive.RUNS), _requests(rows, part, rate_rps))
    per_s = statistics.median(speed for speed, _ in timed)
    good, offered = timed[0][1].good("chat")
    return {
        "benchmark": "sim",
        "runs": runs,
        "requests": len(timed[0][1]),
        "rate_rps": rate_rps,
        "workers": 2 * WORKERS_A_ROLE,
        "requests_per_s": per_s,
        "requests_per_s_each": [speed for speed, _ in timed],
        "bar_per_s": BAR_PER_S,
        "over_bar": per_s / BAR_PER_S,
        "objects_requests_per_s": objects,
        "attainment": good / offered,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def eight_workers() -> Setup:
    """OPT-13B on eight A100, disaggregated 4:4, step times by roofline."""
    model, device = model_named("opt-13b"), device_named("a100-80g")
    latency = Roofline(model, Layout(device))
    blocks = kv_capacity_tokens(model, device.memory_bytes, 1, 0.9) // 16
    workers = [
        WorkerSpec(WorkerId(f"{role.value}-{number}"), role, latency, blocks)
        for role in (SimRole.PREFILL, SimRole.DECODE)
        for number in range(WORKERS_A_ROLE)
    ]
    link = link_of_rate(device.link_bytes_s, 20e-6)
    transfer = LinkTransfer(model.kv_bytes_per_token, 16, link, link, 0.0)
    rules = RouterRules((SloClass("chat", 2.0, 0.1, 5.0),))
    return Setup(tuple(workers), rules, transfer)


def _requests(rows: Sequence[TraceRow] | None, count: int, rate_rps: float) -> Iterator[SimRequest]:
    draws = random.Random(5)
    if rows is not None:
        made = requests(_repeated(rows), _repeated_times(rows, rate_rps), {"chat": 1.0}, draws)
    else:
        times_s = arrival_times_s(ArrivalProcess.POISSON, rate_rps, draws)
        made = requests(lognormal_lengths(*_LIKE_AZURE, random.Random(6)), times_s, {"chat": 1.0}, draws)
    return islice(made, count)


def _repeated(rows: Sequence[TraceRow]) -> Iterator[TraceRow]:
    while True:
        yield from rows


def _repeated_times(rows: Sequence[TraceRow], rate_rps: float) -> Iterator[float]:
    """The trace's times at that rate, again and again, with a mean gap between its end and its start."""
    times_s = rate_scaled(rows, rate_rps)
    start_s = 0.0
    while True:
        yield from [start_s + time_s for time_s in times_s]
        start_s += times_s[-1] + 1.0 / rate_rps


def _timed(setup: Setup, asked: Iterator[SimRequest]) -> tuple[float, Records]:
    """Requests a second of CPU time, and their records."""
    began_s = time.process_time()
    records = simulate(setup, asked).records
    return len(records) / (time.process_time() - began_s), records


def _text(result: dict[str, Any]) -> str:
    return (
        f"{result['requests_per_s']:,.0f} requests/s on one core ({result['over_bar']:.2f} x the bar of "
        f"{result['bar_per_s']:,}); full objects {result['objects_requests_per_s']:,.0f}/s; "
        f"peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )
