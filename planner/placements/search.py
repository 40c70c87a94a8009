"""Pure: finds the candidates with the most goodput for their price, simulating as few as it can.

Branch and bound: candidates come in the order of their bound (goodput for price at best). A candidate is
simulated only while its bound beats the worst that is kept of its kind (which devices serve which role),
and is bisected only if it meets the SLO at the rate that beats it. A wave is as many as are run at the
same time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf

from planner.placements.bound import Bounds
from planner.placements.goodput import Goodput, Probe
from planner.placements.placement import Candidate
from planner.placements.space import Space

WAVE = 8
"""Candidates judged by the same knowledge; not the number of processes, so that this changes no result."""

Progress = Callable[[int, int], None]
"""Told how many candidates are settled, and of how many."""

FindMany = Callable[[Sequence[Probe]], Iterable[Goodput]]
"""Answers probes in their order, perhaps in other processes."""


@dataclass(frozen=True, slots=True)
class Bounded:
    """A candidate with the rate it hardly exceeds, for one bucket."""

    candidate: Candidate
    bound_rps: float
    cost: float

    @property
    def at_best(self) -> float:
        """Requests a second for the price of an hour, at best."""
        return self.bound_rps / self.cost


@dataclass(frozen=True, slots=True)
class Searched:
    """What the search knows: candidates that were bisected, best first, and how many needed no run."""

    found: tuple[Goodput, ...]
    candidates: int
    simulated: int
    hopeless: int


def bounded(space: Space, bounds: Bounds, every: Iterable[Candidate]) -> list[Bounded]:
    """Candidates with their bounds, the most promising first; ties by fewer devices, then by name."""
    found = [Bounded(each, bounds.rate_rps(each), space.cost(each)) for each in every]
    return sorted(
        found, key=lambda one: (-one.at_best, sum(one.candidate.devices.values()), str(one.candidate))
    )


def search(
    ranked: Sequence[Bounded],
    find_many: FindMany,
    keep: int,
    slack: float,
    progress: Progress,
    bucket: int = 0,
) -> Searched:
    """Keeps the `keep` best of every kind. `slack` is granted to bounds (0.1: they may be 10 % too low)."""
    hopeful = [one for one in ranked if one.bound_rps > 0]
    kept = _Kept(keep)
    found: list[Goodput] = []
    pending, simulated = hopeful, 0
    while pending:
        wave, pending = kept.next_wave(pending, slack)
        for one, answer in zip(wave, find_many([kept.probe(one, bucket) for one in wave]), strict=True):
            simulated += 1
            if not answer.given_up:
                found.append(answer)
                kept.add(one, answer.rate_rps)
        progress(len(hopeful) - len(pending), len(hopeful))
    cost = {one.candidate: one.cost for one in hopeful}
    found.sort(key=lambda one: -one.rate_rps / cost[one.candidate])
    return Searched(tuple(found), len(ranked), simulated, len(ranked) - len(hopeful))


class _Kept:
    """The best goodputs for price of each kind, which later candidates have to beat."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._best: dict[tuple[str, ...], list[float]] = {}

    def add(self, one: Bounded, rate_rps: float) -> None:
        """A candidate was bisected."""
        best = self._best.setdefault(one.candidate.signature, [])
        best.append(rate_rps / one.cost)
        best.sort(reverse=True)

    def probe(self, one: Bounded, bucket: int) -> Probe:
        """What to ask of a candidate: to beat the worst that is kept of its kind."""
        return Probe(one.candidate, one.bound_rps, max(0.0, self._to_beat(one)) * one.cost, bucket)

    def next_wave(self, pending: Sequence[Bounded], slack: float) -> tuple[list[Bounded], list[Bounded]]:
        """Candidates to run now, and those to judge later; those that can't be kept are in neither.

        Of a kind with too few known ones only as many are run as are missing: what they reach spares others
        their bisection.
        """
        wave: list[Bounded] = []
        later: list[Bounded] = []
        planned: Counter[tuple[str, ...]] = Counter()
        for one in pending:
            signature = one.candidate.signature
            if one.at_best * (1 + slack) <= self._to_beat(one):
                continue
            known = len(self._best.get(signature, ()))
            if len(wave) == WAVE or (known < self._keep and known + planned[signature] >= self._keep):
                later.append(one)
                continue
            planned[signature] += 1
            wave.append(one)
        return wave, later

    def _to_beat(self, one: Bounded) -> float:
        best = self._best.get(one.candidate.signature, [])
        return best[self._keep - 1] if len(best) >= self._keep else -inf
