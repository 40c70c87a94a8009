"""Six workers with OPT-13B, eight times as slow as an A100-80GB, under loads whose mix of lengths shifts."""

import random
from collections.abc import Iterator, Sequence

from planner.control.controller import ControllerRules
from planner.control.load_window import RolePlacement
from planner.control.role_capacity import CapacityOf, bound_capacity
from planner.placements.placement import Slo, WorkerKind
from planner.simulation.setup import RouterRules, Setup, SimRole, WorkerSpec
from planner.workloads.workload import Lognormal, SimRequest, lognormal_lengths
from tandem.ids import WorkerId
from tandem.slo import SloClass
from tests.planner.placement_cases import Opt13bWorkers

KIND = WorkerKind("slow")
WORKERS = Opt13bWorkers(8.0)
MAX_BATCH = 32
WINDOW_S = 60.0
RULES = ControllerRules(fewest=2, most=6)
CHAT, READ, WRITE = (500, 80, 2.5), (1000, 30, 3.1), (150, 200, 2.4)
"""Mean prompt tokens, mean output tokens, requests a second."""


def opt_capacity() -> CapacityOf:
    """Capacities of the six workers' kind."""
    return bound_capacity(WORKERS, KIND, Slo(8.0, 0.5, 30.0, 0.9), MAX_BATCH)


def six_workers(prefill: int) -> Setup:
    """So many of six read prompts at first."""
    latency = WORKERS.latency(KIND)
    assert latency is not None
    roles = [SimRole.PREFILL] * prefill + [SimRole.DECODE] * (6 - prefill)
    specs = tuple(
        WorkerSpec(
            WorkerId(f"worker-{number}"), role, latency, WORKERS.kv_tokens(KIND) // 16, max_batch=MAX_BATCH
        )
        for number, role in enumerate(roles)
    )
    return Setup(specs, RouterRules((SloClass("chat", 8.0, 0.5, 30.0),)), WORKERS.transfer())


def shifting_load(phases: Sequence[tuple[tuple[int, int, float], float]], seed: int) -> list[SimRequest]:
    """Poisson arrivals; each phase has its mix and lasts so many seconds."""
    return list(_shifting(phases, random.Random(seed)))


def _shifting(
    phases: Sequence[tuple[tuple[int, int, float], float]], draws: random.Random
) -> Iterator[SimRequest]:
    at_s = phase_end_s = 0.0
    number = 0
    for (prompt, output, rate_rps), span_s in phases:
        at_s, phase_end_s = phase_end_s, phase_end_s + span_s
        rows = lognormal_lengths(Lognormal(prompt, 0.5, 2000), Lognormal(output, 0.5, 1500), draws)
        for row in rows:
            at_s += draws.expovariate(rate_rps)
            if at_s >= phase_end_s:
                break
            yield SimRequest(number, at_s, row.prompt_tokens, row.output_tokens, "chat")
            number += 1


def placed(text: str) -> RolePlacement:
    """`"2+4"` as a placement."""
    prefill, decode = map(int, text.split("+"))
    return RolePlacement(prefill, decode)
