"""Edge: runs a candidate in the simulator (planner/simulator.py); draws arrivals from the plan's seeds."""

import random
from collections.abc import Iterator
from itertools import compress, cycle, islice
from math import ceil

from planner.placements.placement import Candidate, Objective, Reached, Slo, WorkerKind
from planner.plan.run import Problem
from planner.simulation.records import Allowance, Records
from planner.simulation.setup import RouterRules, Setup, SimRole, WorkerSpec
from planner.simulator import simulate
from planner.workloads.arrivals import ArrivalProcess, arrival_times_s
from planner.workloads.workload import SimRequest
from tandem.errors import ConfigError
from tandem.ids import WorkerId
from tandem.slo import SloClass

_CLASS = "planned"

LONGEST_RUN = 20
"""A run has no more than so many times the requests that were asked for, however short it is: requests of a
few tokens come so fast that seconds of them are millions.
"""


class SimulatedCandidate:
    """Evaluate by simulation: `requests` of the plan for each of its seeds, all counted together.

    With `only_whether` a run ends once it can't meet the share asked for: the share reached is then below
    it, and no more than that is known.
    """

    def __init__(self, problem: Problem, only_whether: bool = False) -> None:
        self._problem = problem
        self._only_whether = only_whether
        self.slo = problem.slo
        self.tolerance = problem.plan.search.tolerance

    def __call__(
        self, candidate: Candidate, rate_rps: float, bucket: int = 0, slo_scale: float = 1.0
    ) -> Reached:
        """See Evaluate."""
        offered = good = 0
        met = dict.fromkeys(Objective, 0)
        for seed in self._problem.plan.workload.seeds:
            count = self._run_length(rate_rps)
            asked = self._requests(rate_rps, bucket, seed, count)
            first = int(count * self._problem.plan.workload.uncounted)
            allowance = self._allowance(count, first) if slo_scale == 1.0 else None
            records = simulate(self._setup(candidate, allowance), asked).records
            counted = count_met(records, self.slo, slo_scale, first)
            offered, good = offered + counted.offered, good + counted.good
            for objective in Objective:
                met[objective] += counted.met[objective]
        return Reached(offered, good, met)

    def _run_length(self, rate_rps: float) -> int:
        workload = self._problem.plan.workload
        long = min(ceil(rate_rps * workload.seconds), LONGEST_RUN * workload.requests)
        return max(workload.requests, long)

    def _requests(self, rate_rps: float, bucket: int, seed: int, count: int) -> Iterator[SimRequest]:
        """The same lengths and the same draws at every rate, so that only the gaps' scale differs."""
        workload = self._problem.plan.workload
        process = ArrivalProcess(workload.arrivals)
        times_s = arrival_times_s(process, rate_rps, random.Random(seed), workload.variation)
        pairs = cycle(self._problem.buckets[bucket].pairs)
        for number, ((prompt, output), at_s) in enumerate(islice(zip(pairs, times_s, strict=False), count)):
            yield SimRequest(number, at_s, prompt, output, _CLASS)

    def _allowance(self, count: int, first: int) -> Allowance | None:
        """Seeds are counted together: the others could make up for one."""
        if not self._only_whether:
            return None
        seeds = len(self._problem.plan.workload.seeds)
        return Allowance(ceil(seeds * (count - first) * (1 - self.slo.attainment)), first)

    def _setup(self, candidate: Candidate, allowance: Allowance | None) -> Setup:
        workers: list[WorkerSpec] = []
        if candidate.decode is None:
            workers += self._specs(SimRole.COLOCATED, candidate.prefill, candidate.prefill_workers, "")
        else:
            there = "" if candidate.same_node else "decode nodes"
            workers += self._specs(SimRole.PREFILL, candidate.prefill, candidate.prefill_workers, "")
            workers += self._specs(SimRole.DECODE, candidate.decode, candidate.decode_workers, there)
        slo = self.slo
        planned = SloClass(_CLASS, slo.ttft_s, slo.tpot_s, slo.longest_gap_s)
        return Setup(
            tuple(workers),
            RouterRules((planned,)),
            self._problem.workers.transfer(),
            allowance=allowance,
            early=self._problem.workers.early(),
            hops=self._problem.workers.hops(),
        )

    def _specs(self, role: SimRole, kind: WorkerKind, count: int, node: str) -> Iterator[WorkerSpec]:
        plan, model = self._problem.plan, self._problem.workers.latency(kind)
        if model is None:
            raise ConfigError(f"{kind} has no step times")
        blocks = self._problem.workers.kv_tokens(kind) // plan.block_size
        for number in range(count):
            yield WorkerSpec(
                WorkerId(f"{role.value}-{number}"),
                role,
                model,
                blocks,
                node,
                plan.block_size,
                plan.token_budget,
                plan.max_batch,
                policy=plan.colocated_policy,
                whole_prompts=plan.whole_prompts,
            )


def count_met(records: Records, slo: Slo, scale: float, first: int = 0) -> Reached:
    """How many requests from number `first` on met each objective times `scale`; nan meets none."""
    times = records.times
    every = zip(times["ttft_s"], times["tpot_s"], times["longest_gap_s"], strict=True)
    counted = [number >= first for number in records.numbers]
    rows = list(compress(every, counted))
    limits = (slo.ttft_s * scale, slo.tpot_s * scale, slo.longest_gap_s * scale)
    met = {
        objective: sum(row[number] <= limit for row in rows)
        for number, (objective, limit) in enumerate(zip(Objective, limits, strict=True))
    }
    finished = compress(records.column("outcome"), counted)
    good = sum(
        all(time_s <= limit for time_s, limit in zip(row, limits, strict=True)) and outcome == "finished"
        for row, outcome in zip(rows, finished, strict=True)
    )
    return Reached(len(rows), good, met)
