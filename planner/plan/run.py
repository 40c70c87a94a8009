"""Edge: makes a plan from plan.yaml: reads its files, bounds, searches in processes, mixes, and says why
not."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.placements.bound import Bounds, Lengths
from planner.placements.goodput import Goodput
from planner.placements.mix import Mix, Option, cheapest_mix, largest_mix
from planner.placements.placement import Mode, NodeGroup, Slo
from planner.placements.search import FindMany, Progress, Searched, bounded, search
from planner.placements.space import Affinity, Space, candidates, worker_kinds
from planner.plan.file import PlanFile
from planner.plan.refusals import fits_nowhere, impossible_slo, not_enough_devices
from planner.plan.result import PlanResult, ranking
from planner.plan.workers import PlannedWorkers
from planner.plan.workload import buckets_of, read_lengths
from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Problem:
    """A plan's file with everything that follows from it but the search."""

    plan: PlanFile
    workers: PlannedWorkers
    space: Space
    slo: Slo
    buckets: tuple[Lengths, ...]

    def bounds(self, bucket: int) -> Bounds:
        """Bounds of candidates that serve one bucket."""
        return Bounds(self.workers, self.buckets[bucket], self.slo, self.plan.max_batch)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of requests in each bucket."""
        total = sum(len(bucket.pairs) for bucket in self.buckets)
        return tuple(len(bucket.pairs) / total for bucket in self.buckets)


def read_problem(plan: PlanFile, folder: Path) -> Problem:
    """Files are relative to `folder`. Raises ConfigError, InvalidRequest for files and names without
    sense."""
    groups = tuple(
        NodeGroup(nodes.device, nodes.nodes, nodes.devices_per_node, nodes.price_per_hour)
        for nodes in plan.hardware
    )
    space = Space(
        groups,
        plan.search.tp,
        plan.search.pp,
        plan.search.most_workers,
        Affinity(plan.search.affinity),
        tuple(Mode(mode) for mode in plan.search.modes),
    )
    slo = Slo(plan.slo.ttft_s, plan.slo.tpot_s, plan.slo.longest_gap_s, plan.slo.attainment)
    lengths = read_lengths(plan.workload, folder)
    buckets = buckets_of(lengths, plan.workload.buckets)
    return Problem(plan, PlannedWorkers(plan, folder), space, slo, buckets)


def make_plan(problem: Problem, find_many: FindMany, progress: Progress) -> PlanResult:
    """Searches every bucket, then mixes. Raises ConfigError that says what would be needed when nothing
    will do."""
    searched = [_searched(problem, bucket, find_many, progress) for bucket in range(len(problem.buckets))]
    found = [answer for one in searched for answer in one.found]
    mix = _mix(problem, found)
    return PlanResult(
        mix,
        ranking(searched[0].found, problem.space, problem.bounds(0)),
        sum(one.candidates for one in searched),
        sum(one.simulated for one in searched),
        sum(one.hopeless for one in searched),
        _cautions(problem),
    )


def _searched(problem: Problem, bucket: int, find_many: FindMany, progress: Progress) -> Searched:
    lengths, bounds = problem.buckets[bucket], problem.bounds(bucket)
    kinds = worker_kinds(problem.space, problem.workers, lengths.longest_tokens)
    if not kinds:
        raise fits_nowhere(problem.space, problem.workers, lengths.longest_tokens)
    ranked = bounded(problem.space, bounds, candidates(problem.space, kinds))
    search_options = problem.plan.search
    result = search(ranked, find_many, search_options.keep, search_options.slack, progress, bucket)
    if not any(one.rate_rps > 0 for one in result.found):
        raise impossible_slo(kinds, bounds, problem.slo)
    return result


def _mix(problem: Problem, found: Sequence[Goodput]) -> Mix:
    rates: dict[object, list[float]] = {}
    for one in found:
        rates.setdefault(one.candidate, [0.0] * len(problem.buckets))[one.bucket] = one.rate_rps
    options = [
        Option(one.candidate, tuple(rates[one.candidate]), problem.space.cost(one.candidate))
        for one in {each.candidate: each for each in found}.values()
    ]
    largest = largest_mix(options, problem.space.groups, problem.shares)
    if largest is None:
        raise ConfigError("no candidate serves every bucket of lengths; plan with workload.buckets: 1")
    asked = problem.plan.rate_rps
    if asked is None:
        return largest
    cheapest = cheapest_mix(options, problem.space.groups, [asked * share for share in problem.shares])
    if cheapest is None:
        raise not_enough_devices(asked, largest, problem.space)
    return cheapest


def _cautions(problem: Problem) -> tuple[str, ...]:
    """What was forecast without a measurement."""
    said = []
    for nodes in problem.plan.hardware:
        if nodes.latency.kind == "roofline":
            where = "" if nodes.latency.file is None else " except workers of one device"
            said.append(f"{nodes.device}: step times are a roofline's{where}, nothing was measured")
    return tuple(said)
