"""Edge: answers probes in processes of their own, as many as there are cores; each reads the plan once."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType

from planner.placements.goodput import Goodput, Probe, find_goodput
from planner.placements.placement import Candidate, Reached
from planner.placements.simulated_candidate import SimulatedCandidate
from planner.plan.file import PlanFile
from planner.plan.run import read_problem

Run = tuple[Candidate, float, int, float]
"""Candidate, rate in req/s, bucket, SLO scale."""


class PlanProcesses:
    """Spawned processes that simulate; leaving the `with` ends them. One process: everything runs here."""

    def __init__(self, plan: PlanFile, folder: Path) -> None:
        count = plan.search.processes or os.cpu_count() or 1
        self._asked = (plan.model_dump_json(), str(folder))
        self._pool = ProcessPoolExecutor(count, mp_context=get_context("spawn")) if count > 1 else None

    def find_many(self, probes: Sequence[Probe]) -> Iterable[Goodput]:
        """See FindMany."""
        work = partial(_found, *self._asked)
        return map(work, probes) if self._pool is None else self._pool.map(work, probes)

    def attainments(self, runs: Sequence[Run]) -> Iterable[Reached]:
        """Single runs, in their order."""
        work = partial(_attained, *self._asked)
        return map(work, runs) if self._pool is None else self._pool.map(work, runs)

    def __enter__(self) -> "PlanProcesses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _found(plan_json: str, folder: str, probe: Probe) -> Goodput:
    simulate = _simulated(plan_json, folder, only_whether=True)
    return find_goodput(simulate, probe, simulate.slo.attainment, simulate.tolerance)


def _attained(plan_json: str, folder: str, run: Run) -> Reached:
    return _simulated(plan_json, folder, only_whether=False)(*run)


@lru_cache(maxsize=2)
def _simulated(plan_json: str, folder: str, only_whether: bool) -> SimulatedCandidate:
    plan = PlanFile.model_validate_json(plan_json)
    return SimulatedCandidate(read_problem(plan, Path(folder)), only_whether)
