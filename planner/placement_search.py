"""Pure: finds the candidates with the most goodput for their price, simulating as few as it can.

Branch and bound: candidates come in the order of their bound (goodput for price at best). A candidate is
simulated only while its bound beats the worst that is kept of its kind (which devices serve which role),
and is bisected only if it meets the SLO at the rate that beats it. A wave is as many as are run at the
same time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from planner.goodput import Goodput, Probe
from planner.placement import Candidate
from planner.placement_bound import Bounds
from planner.placement_space import Space

WAVE = 8
"""Candidates judged by the same knowledge; not the number of processes, so that this changes no result."""

Progress = Callable[[int, int], None]
"""Told how many candidates are settled, and of how many."""

FindMany = Callable[[Sequence[Probe]], Iterable[Goodput]]
"""Answers probes in their order, perhaps in other processes."""


@dataclass(frozen=True, slots=True)
class Bounded:
    """A candidate with the rate it cannot exceed, for one bucket."""

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
    kept: dict[tuple[str, ...], list[float]] = {}
    found: list[Goodput] = []
    simulated = settled = 0
    for wave in _waves(hopeful, kept, keep, slack):
        probes = [_probe(one, kept, keep, bucket) for one in wave.candidates]
        settled += wave.passed_over + len(probes)
        for one, answer in zip(wave.candidates, find_many(probes), strict=True):
            simulated += 1
            if not answer.given_up:
                found.append(answer)
                best = kept.setdefault(one.candidate.signature, [])
                best.append(answer.rate_rps / one.cost)
                best.sort(reverse=True)
        progress(settled, len(hopeful))
    progress(len(hopeful), len(hopeful))
    cost = {one.candidate: one.cost for one in hopeful}
    found.sort(key=lambda one: -one.rate_rps / cost[one.candidate])
    return Searched(tuple(found), len(ranked), simulated, len(ranked) - len(hopeful))


@dataclass(frozen=True, slots=True)
class _Wave:
    candidates: tuple[Bounded, ...]
    passed_over: int


def _waves(
    hopeful: Sequence[Bounded], kept: dict[tuple[str, ...], list[float]], keep: int, slack: float
) -> Iterator[_Wave]:
    """Candidates that could still be kept, a wave at a time; `kept` grows between waves."""
    wave: list[Bounded] = []
    passed_over = 0
    for one in hopeful:
        if one.at_best * (1 + slack) <= _to_beat(kept, one.candidate, keep):
            passed_over += 1
            continue
        wave.append(one)
        if len(wave) == WAVE:
            yield _Wave(tuple(wave), passed_over)
            wave, passed_over = [], 0
    if wave or passed_over:
        yield _Wave(tuple(wave), passed_over)


def _to_beat(kept: dict[tuple[str, ...], list[float]], candidate: Candidate, keep: int) -> float:
    best = kept.get(candidate.signature, [])
    return best[keep - 1] if len(best) >= keep else -inf


def _probe(one: Bounded, kept: dict[tuple[str, ...], list[float]], keep: int, bucket: int) -> Probe:
    at_least = max(0.0, _to_beat(kept, one.candidate, keep)) * one.cost
    return Probe(one.candidate, one.bound_rps, at_least, bucket)
