"""Pure: the largest rate at which a candidate still meets its SLO, found by bisection over runs."""

from dataclasses import dataclass

from planner.placements.placement import Candidate, Evaluate, Objective, Reached

_STARTS = (0.5, 0.1, 0.02)
"""Shares of the bound that are tried first, until one passes."""
_GROWTH = (1.05, 1.2, 1.6, 2.5, 4.0)
"""Steps above a bound that passes: bounds err by little, and runs far beyond goodput cost the most."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What to find out: the goodput of a candidate for one bucket, if it reaches `at_least_rps` at all.

    `bound_rps` is where the search begins; the answer may lie above it, since a bound may be wrong.
    """

    candidate: Candidate
    bound_rps: float
    at_least_rps: float = 0.0
    bucket: int = 0


@dataclass(frozen=True, slots=True)
class Goodput:
    """The answer. `given_up`: it misses the SLO at the rate it had to reach; `rate_rps` is then 0.

    `failing` is the lowest rate that was seen to fail and `binding` the objective most missed there.
    """

    candidate: Candidate
    rate_rps: float
    bucket: int = 0
    given_up: bool = False
    failing_rps: float = 0.0
    failing: Reached | None = None
    runs: int = 0

    @property
    def binding(self) -> Objective | None:
        """The objective that holds the rate down; None when nothing failed."""
        return None if self.failing is None else self.failing.binding


def find_goodput(evaluate: Evaluate, probe: Probe, attainment: float, tolerance: float) -> Goodput:
    """Bisects until the rate is known within `tolerance` (relative). At least one run, about ten."""
    search = _Search(evaluate, probe, attainment)
    starts = (probe.at_least_rps,) if probe.at_least_rps else (share * probe.bound_rps for share in _STARTS)
    least = next((rate for rate in starts if search.passes(rate)), None)
    if least is None:
        return search.found(0.0, given_up=True)
    # Many candidates tie with the one to beat, since the same part of both is full: that is seen at once.
    nearby = least * (1 + tolerance)
    if probe.at_least_rps and search.passes(nearby):
        least = nearby
    high = search.failing_rps or max(probe.bound_rps, least * (1 + tolerance))
    for growth in _GROWTH:
        if high == search.failing_rps or not search.passes(high):
            break
        least, high = high, growth * high
    while high > least * (1 + tolerance):
        middle = (least + high) / 2
        if search.passes(middle):
            least = middle
        else:
            high = middle
    return search.found(least, given_up=False)


class _Search:
    """Runs of one probe, and the lowest that failed."""

    def __init__(self, evaluate: Evaluate, probe: Probe, attainment: float) -> None:
        self._evaluate, self._probe, self._asked = evaluate, probe, attainment
        self._failing: Reached | None = None
        self.failing_rps = 0.0
        self._runs = 0

    def passes(self, rate_rps: float) -> bool:
        """Whether the share asked for is met; remembers a failure."""
        self._runs += 1
        reached = self._evaluate(self._probe.candidate, rate_rps, self._probe.bucket)
        if reached.share >= self._asked:
            return True
        if self._failing is None or rate_rps < self.failing_rps:
            self._failing, self.failing_rps = reached, rate_rps
        return False

    def found(self, rate_rps: float, given_up: bool) -> Goodput:
        """The answer."""
        return Goodput(
            self._probe.candidate,
            rate_rps,
            self._probe.bucket,
            given_up,
            self.failing_rps,
            self._failing,
            self._runs,
        )
