"""Edge: `tandem bench serve`: offers a load to a running cluster and says how good its service was."""

import argparse
import asyncio
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bench_arguments import check_positive
from benchmarks.latency_summary import LoadSummary, Outcome, OutcomeKind, Spread, summarise
from benchmarks.load_generator import offer
from benchmarks.targets import GrpcTarget, HttpTarget, Target
from benchmarks.workload import Arrivals, LengthLimits, PlannedRequest, TokenDraws, plan
from planner.workloads.arrivals import ArrivalProcess
from planner.workloads.trace_file import read_trace_file
from planner.workloads.traces import TraceRow
from planner.workloads.workload import fixed_lengths
from tandem.client import AsyncTandemClient
from tandem.errors import InvalidRequest, TandemError
from tandem.slo import SloClass

WARM_UP_TOKENS = 4
SHOWN_FAILURES = 5
TRACE_TIMES = "trace"


@dataclass(frozen=True, slots=True)
class Served:
    """What is known of the cluster before the load starts."""

    model: str
    context_tokens: int
    vocabulary_tokens: int
    slo_classes: dict[str, SloClass]


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a load; `arrivals` says whose times it had, a trace's own or a process's."""

    summary: LoadSummary
    outcomes: tuple[Outcome, ...]
    arrivals: str


def run(chosen: argparse.Namespace) -> int:
    """Prints the summary; exit code 0 when at least one request completed. Raises TandemError."""
    _check(chosen)
    measured = asyncio.run(_measure(chosen))
    summary = measured.summary
    if chosen.json:
        print(json.dumps(serve_json(chosen, measured.arrivals, summary)))
    else:
        _print(summary)
    for text, times in Counter(outcome.detail for outcome in measured.outcomes if outcome.detail).most_common(
        SHOWN_FAILURES
    ):
        print(f"{times} x {text}", file=sys.stderr)
    return 0 if summary.completed else 1


def serve_json(chosen: argparse.Namespace, arrivals: str, summary: LoadSummary) -> dict[str, Any]:
    """Output of `tandem bench serve --json`; the keys are documented in docs/json-output.md."""
    load = {
        "api": chosen.api,
        "trace": None if chosen.trace is None else chosen.trace.name,
        "arrivals": arrivals,
        "rate_rps": chosen.rate,
        "limit": chosen.limit,
        "length_scale": chosen.length_scale,
        "max_output_tokens": chosen.max_output_tokens,
        "seed": chosen.seed,
    }
    goodput_rps = sum(entry.goodput_rps for entry in summary.classes)
    return {"benchmark": "serve", "load": load, "goodput_rps": goodput_rps, **asdict(summary)}


async def _measure(chosen: argparse.Namespace) -> Measured:
    rows = _rows(chosen)
    served = await _ask_cluster(chosen.address)
    objectives = {**served.slo_classes, **_objectives(chosen.slo)}
    shares = _shares(chosen.classes) or {next(iter(objectives)): 1.0}
    for name in shares:
        if name not in objectives:
            raise InvalidRequest(f"Unknown SLO class {name!r}; known: {', '.join(objectives)}.", "--class")
    requests = _plan(chosen, rows, served, shares)
    target: Target = (
        GrpcTarget(chosen.address) if chosen.api == "grpc" else HttpTarget(chosen.http_address, served.model)
    )
    try:
        await _warm_up(target, requests, chosen.timeout)
        outcomes = await offer(requests, target, chosen.timeout, _progress(len(requests)))
    finally:
        await target.close()
    timed = all(row.arrived_s is not None for row in rows)
    summary = summarise(outcomes, {name: objectives[name] for name in shares})
    return Measured(summary, outcomes, TRACE_TIMES if timed else chosen.arrivals)


async def _ask_cluster(address: str) -> Served:
    async with AsyncTandemClient(address) as client:
        status, models = await client.status(), await client.models()
    if not models:
        raise TandemError(f"The router at {address} serves no model.")
    return Served(
        models[0].name,
        models[0].context_tokens,
        models[0].vocabulary_tokens,
        {
            entry.name: SloClass(entry.name, entry.ttft_s, entry.tpot_s, entry.longest_gap_s)
            for entry in status.slo_classes
        },
    )


def _plan(
    chosen: argparse.Namespace, rows: Sequence[TraceRow], served: Served, shares: dict[str, float]
) -> tuple[PlannedRequest, ...]:
    output_room = min(chosen.max_output_tokens, served.context_tokens - 1)
    prompt_room = served.context_tokens - output_room
    limits = LengthLimits(
        chosen.length_scale,
        min(chosen.max_prompt_tokens or prompt_room, prompt_room),
        output_room,
        served.vocabulary_tokens,
    )
    arrivals = Arrivals(ArrivalProcess(chosen.arrivals), chosen.rate, chosen.variation)
    return plan(rows, arrivals, limits, shares, _seeded(chosen.seed))


def _seeded(seed: int) -> Callable[[str], TokenDraws]:
    return lambda name: random.Random(f"{seed} {name}")


def _check(chosen: argparse.Namespace) -> None:
    """Raises InvalidRequest for what no cluster is needed to refuse."""
    options = (
        *("limit", "rate", "variation", "length_scale", "timeout"),
        *("max_prompt_tokens", "max_output_tokens", "prompt_tokens", "output_tokens"),
    )
    check_positive({f"--{name.replace('_', '-')}": getattr(chosen, name) for name in options})
    _shares(chosen.classes)
    _objectives(chosen.slo)


def _rows(chosen: argparse.Namespace) -> Sequence[TraceRow]:
    if chosen.trace is None and chosen.rate is None:
        raise InvalidRequest("Without --trace, --rate is needed.", "--rate")
    if chosen.trace is None:
        return tuple(islice(fixed_lengths(chosen.prompt_tokens, chosen.output_tokens), chosen.limit))
    return read_trace_file(chosen.trace, chosen.limit)


def _shares(texts: Sequence[str]) -> dict[str, float]:
    return {name: values[0] for name, values in _pairs(texts, 1, "--class").items()}


def _objectives(texts: Sequence[str]) -> dict[str, SloClass]:
    return {name: SloClass(name, *values) for name, values in _pairs(texts, 3, "--slo").items()}


def _pairs(texts: Sequence[str], count: int, option: str) -> dict[str, list[float]]:
    """Parses NAME=NUMBER[,NUMBER...]."""
    pairs: dict[str, list[float]] = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        try:
            pairs[name] = [float(number) for number in numbers.split(",")]
        except ValueError:
            pairs[name] = []
        if not name or len(pairs[name]) != count or not all(0 <= one < math.inf for one in pairs[name]):
            message = f"{option} {text!r}: expected NAME= and {count} number(s), none negative."
            raise InvalidRequest(message, option)
    return pairs


async def _warm_up(target: Target, requests: Sequence[PlannedRequest], timeout_s: float) -> None:
    """One short request, so that connections and first-time costs are not counted."""
    first = requests[0]
    warm = PlannedRequest(0.0, first.token_ids[-1:] * WARM_UP_TOKENS, WARM_UP_TOKENS, first.slo_class)
    async for _ in target.tokens(warm, timeout_s):
        pass


def _progress(total: int) -> Callable[[Outcome], None]:
    """A counter on standard error, when that is a terminal."""
    ended = 0

    def show(_outcome: Outcome) -> None:
        nonlocal ended
        ended += 1
        if sys.stderr.isatty():
            print(f"\r{ended}/{total}", end="\n" if ended == total else "", file=sys.stderr, flush=True)

    return show


def _print(summary: LoadSummary) -> None:
    console = Console(highlight=False)
    ends = ", ".join(f"{getattr(summary, kind.value)} {kind.value.replace('_', ' ')}" for kind in OutcomeKind)
    console.print(
        f"{summary.offered} requests in {summary.duration_s:.1f} s ({summary.offered_rps:.2f}/s): {ends}\n"
        f"{summary.output_tokens_per_s:.1f} output tokens/s, "
        f"{summary.prompt_tokens_per_s:.1f} prompt tokens/s, "
        f"largest send lag {summary.largest_send_lag_s * 1e3:.1f} ms"
    )
    times = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("ms", "mean", "p50", "p90", "p99"):
        times.add_column(title, justify="left" if title == "ms" else "right")
    for name, values in (("TTFT", summary.ttft_s), ("TPOT", summary.tpot_s), ("ITL", summary.itl_s)):
        times.add_row(name, *_milliseconds(values))
    console.print(times)
    for entry in summary.classes:
        console.print(
            f"{entry.name}: {entry.good}/{entry.offered} good = {entry.attainment:.1%} "
            f"(95 %: {entry.attainment_low:.1%} to {entry.attainment_high:.1%}), "
            f"goodput {entry.goodput_rps:.2f}/s  "
            f"[TTFT {entry.ttft_s:g} s, TPOT {entry.tpot_s:g} s, gap {entry.longest_gap_s:g} s]",
            markup=False,
        )


def _milliseconds(values: Spread) -> list[str]:
    numbers = (values.mean, values.p50, values.p90, values.p99)
    return ["-" if number is None else f"{number * 1e3:.1f}" for number in numbers]
