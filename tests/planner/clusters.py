"""Small simulated clusters and loads for tests; times are exact sums, so that no rounding hides a fault."""

import random
from collections.abc import Sequence

from planner.simulation.setup import (
    Drive,
    EarlyFetch,
    Fault,
    Hops,
    RouterRules,
    Setup,
    SimRole,
    WorkerSpec,
)
from planner.simulator import SimulationResult, simulate
from planner.workloads.workload import SimRequest
from tandem.ids import WorkerId
from tandem.slo import SloClass
from tests.planner.linear_latency import TICK_S, LinearLatency, LinearTransfer

CHAT = SloClass("chat", 2.0, 0.1, 1.0)

LAYERS, LAYER_BYTES = 8, 1 << 16
"""Of a model whose blocks have half a megabyte, so that pieces (from a megabyte on) have two or more."""


def early_fetch(min_tokens: int = 64) -> EarlyFetch:
    """KV of longer prompts moves while they are read, at what LinearTransfer says."""
    return EarlyFetch(min_tokens, LAYERS, LAYER_BYTES, LinearTransfer())


SHORT_HOPS = Hops(3000 * TICK_S, 500 * TICK_S, 700 * TICK_S)


def disaggregated(
    prefill: int = 2,
    decode: int = 2,
    blocks: int = 400,
    drive: Drive = Drive.AUTO,
    faults: Sequence[Fault] = (),
    prefix_cache: bool = False,
    max_batch: int = 256,
    token_budget: int = 512,
    whole_prompts: bool = False,
    rules: RouterRules | None = None,
    early: EarlyFetch | None = None,
    hops: Hops | None = None,
) -> Setup:
    """So many workers of each role, alike."""
    workers = [
        WorkerSpec(
            WorkerId(f"{role.value}-{number}"),
            role,
            LinearLatency(),
            blocks,
            token_budget=token_budget,
            max_batch=max_batch,
            prefix_cache=prefix_cache,
            whole_prompts=whole_prompts,
        )
        for role, count in ((SimRole.PREFILL, prefill), (SimRole.DECODE, decode))
        for number in range(count)
    ]
    limits = RouterRules((CHAT,), context_tokens=4096) if rules is None else rules
    return Setup(
        tuple(workers),
        limits,
        LinearTransfer(),
        tuple(faults),
        drive=drive,
        early=early,
        hops=Hops() if hops is None else hops,
    )


def colocated(policy: str, count: int = 2, blocks: int = 400, token_budget: int = 512) -> Setup:
    """So many colocated workers, alike."""
    workers = [
        WorkerSpec(
            WorkerId(f"colocated-{number}"),
            SimRole.COLOCATED,
            LinearLatency(),
            blocks,
            token_budget=token_budget,
            policy=policy,
        )
        for number in range(count)
    ]
    return Setup(tuple(workers), RouterRules((CHAT,), context_tokens=4096), LinearTransfer())


def load(count: int, rate_rps: float, seed: int, longest: int = 600) -> list[SimRequest]:
    """Poisson arrivals at whole ticks, with lengths of all sizes, answers of one token among them."""
    draws = random.Random(seed)
    asked, at_s = [], 0.0
    for number in range(count):
        at_s += round(draws.expovariate(rate_rps) / TICK_S) * TICK_S
        prompt, output = draws.randint(1, longest), draws.choice((1, 2, 40, draws.randint(1, 300)))
        asked.append(SimRequest(number, at_s, prompt, output, "chat"))
    return asked


def rows(setup: Setup, asked: Sequence[SimRequest]) -> list[str]:
    """The records as CSV lines."""
    return list(simulate(setup, asked).records.csv_lines())


def written(result: SimulationResult) -> dict[int, int]:
    """Tokens written for each request, by its number."""
    records = result.records
    return dict(zip(records.numbers, records.counts["output_tokens"], strict=True))
