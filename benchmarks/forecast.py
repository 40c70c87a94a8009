"""Edge: `tandem bench sim --live`: one prefill and one decode worker, forecast and then measured.

The cluster is profiled through its front door first (live_probe.py). Then, for each rate, the same requests
are simulated with that profile and offered to the cluster.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx

from benchmarks.bench_arguments import check_positive, check_writable
from benchmarks.forecast_report import (
    Compared,
    Figures,
    compared_text,
    forecast_json,
    forecast_page,
    forecast_text,
)
from benchmarks.latency_summary import Outcome, OutcomeKind, spread
from benchmarks.live_asker import LiveAsker
from benchmarks.live_cluster import live_cluster
from benchmarks.live_probe import BLOCK_TOKENS, LiveProbe
from benchmarks.load_generator import offer
from benchmarks.machine_limits import machine_name
from benchmarks.machine_use import cpu_times, others_share
from benchmarks.targets import GrpcTarget
from benchmarks.workload import Arrivals, LengthLimits, PlannedRequest, TokenDraws, plan
from planner.forecast.live_forecast import PairLimits, forecast
from planner.forecast.live_profile import LiveProfile, beside
from planner.latency import PromptPart, StepShape
from planner.step_times.profile_model import ProfileModel
from planner.workloads.arrivals import ArrivalProcess
from planner.workloads.trace_file import read_trace_file
from planner.workloads.traces import TraceRow
from planner.workloads.workload import SimRequest
from tandem.client import AsyncTandemClient
from tandem.errors import InvalidRequest
from tandem.slo import SloClass

SHARES = (0.25, 0.35, 0.45)
"""Default rates, as shares of what the profile says the pair can serve."""

LIMITS = PairLimits()
MOST_PROMPT_TOKENS, MOST_OUTPUT_TOKENS = 512, 128
TIMEOUT_S = 120.0
MODEL_TOKENS = 2048
SETTINGS: dict[str, Any] = {
    "block_size": BLOCK_TOKENS,
    "model": {"context": MODEL_TOKENS},
    "pools": {
        "prefill": {
            "threads": 1,
            "token_budget": LIMITS.token_budget,
            "pool_blocks": LIMITS.pool_blocks,
        },
        "decode": {"threads": 1, "max_batch": LIMITS.max_batch, "pool_blocks": LIMITS.pool_blocks},
    },
    # The cluster's own proofs of life would be counted as load.
    "router": {"canary_interval_s": 3600.0},
}


def run(chosen: argparse.Namespace) -> int:
    """Prints, and writes the files that were asked for. Raises TandemError."""
    counts = {"--runs": chosen.runs, "--requests": chosen.requests}
    check_positive({**counts, "--length-scale": chosen.length_scale})
    check_writable({"--profile": chosen.profile, "--page": chosen.page})
    rows = _rows(chosen)
    result = asyncio.run(_until_terminated(_measure(chosen, rows)))
    print(json.dumps(result) if chosen.json else forecast_text(result))
    if chosen.page is not None:
        chosen.page.write_text(forecast_page(result))
    return 0


async def _until_terminated(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Ends the work in order on SIGTERM, too, so that no cluster outlives it."""
    task = asyncio.create_task(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


async def _measure(chosen: argparse.Namespace, rows: Sequence[TraceRow]) -> dict[str, Any]:
    """Output of `tandem bench sim --live --json`; the keys are documented in docs/json-output.md."""
    slo = SloClass("interactive", *chosen.slo)
    load_before = os.getloadavg()[0]
    async with live_cluster(SETTINGS) as address:
        async with AsyncTandemClient(address) as client, httpx.AsyncClient() as http:
            models = await client.models()
            asker = LiveAsker(client, http)
            await asker.meet()
            profile = await LiveProbe(asker, chosen.runs, LIMITS).profile()
        if chosen.profile is not None:
            await asyncio.to_thread(chosen.profile.write_text, profile.model_dump_json() + "\n")
        rates = chosen.rates or _rates(profile, rows, chosen.length_scale)
        compared = []
        for rate_rps in rates:
            planned = _planned(rows, rate_rps, chosen.length_scale, models[0].vocabulary_tokens)
            print(f"{rate_rps:g} requests/s, {planned[-1].at_s:.0f} s", file=sys.stderr)
            simulated = _forecast(profile, planned, slo)
            before = cpu_times()
            measured = await _measured(address, planned, slo)
            others = others_share(before, cpu_times(), os.cpu_count() or 1)
            compared.append(Compared(rate_rps, *simulated, measured, others))
            print(compared_text(compared[-1]), file=sys.stderr)
    conditions = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_name(),
        "load_average_before": load_before,
        "trace": chosen.trace.name,
        "length_scale": chosen.length_scale,
        "requests": len(rows),
        "slo_s": list(chosen.slo),
    }
    return forecast_json(conditions, compared, profile.model_dump(mode="json"))


def _rows(chosen: argparse.Namespace) -> Sequence[TraceRow]:
    if chosen.trace is None:
        raise InvalidRequest("--live needs --trace, a file of requests.", "--trace")
    count = 300 if chosen.requests is None else chosen.requests
    rows = read_trace_file(chosen.trace, count)
    if len(rows) < 2 or any(row.arrived_s is None for row in rows):
        raise InvalidRequest(f"{chosen.trace} needs two rows or more, with times.", "--trace")
    return rows


def _planned(
    rows: Sequence[TraceRow], rate_rps: float, scale: float, vocabulary: int
) -> tuple[PlannedRequest, ...]:
    def seeded(name: str) -> TokenDraws:
        return random.Random(f"{rate_rps} {name}")

    limits = LengthLimits(scale, MOST_PROMPT_TOKENS, MOST_OUTPUT_TOKENS, vocabulary)
    return plan(rows, Arrivals(ArrivalProcess.POISSON, rate_rps), limits, {"interactive": 1.0}, seeded)


def _rates(profile: LiveProfile, rows: Sequence[TraceRow], scale: float) -> list[float]:
    """Shares of the rate at which the first of both workers would never rest."""
    limits = LengthLimits(scale, MOST_PROMPT_TOKENS, MOST_OUTPUT_TOKENS, 1 << 16)
    model = ProfileModel(beside(profile, profile.company[-1]))
    prompts = [limits.prompt_tokens(row.prompt_tokens) for row in rows]
    outputs = [limits.output_tokens(row.output_tokens) for row in rows]
    reading_s = sum(model.step_s(StepShape((PromptPart(tokens),))) for tokens in prompts) / len(rows)
    widest = max(point.decode_batch for point in profile.points)
    context = sum(prompts) // len(rows)
    writing_s = model.step_s(StepShape((), widest, widest * context)) * sum(outputs) / len(rows) / widest
    return [round(share / max(reading_s, writing_s), 2) for share in SHARES]


def _forecast(
    profile: LiveProfile, planned: Sequence[PlannedRequest], slo: SloClass
) -> tuple[float, float, Figures]:
    asked = [
        SimRequest(number, one.at_s, len(one.token_ids), one.output_tokens, slo.name)
        for number, one in enumerate(planned)
    ]
    found = forecast(profile, asked, slo, LIMITS)
    figures = Figures(spread(found.ttft_s.values()), spread(found.tpot_s.values()), found.attainment)
    return found.prefill_busy, found.decode_busy, figures


async def _measured(address: str, planned: Sequence[PlannedRequest], slo: SloClass) -> Figures:
    target = GrpcTarget(address)
    try:
        outcomes: Sequence[Outcome] = await offer(planned, target, TIMEOUT_S)
    finally:
        await target.close()
    done = [outcome for outcome in outcomes if outcome.kind is OutcomeKind.COMPLETED]
    return Figures(
        spread(outcome.ttft_s for outcome in done if outcome.ttft_s is not None),
        spread(outcome.tpot_s for outcome in done if outcome.tpot_s is not None),
        sum(outcome.meets(slo) for outcome in outcomes) / len(outcomes),
    )
