"""Pure: how many requests of each SLO class were offered and were good, and goodput over the last minute.

The denominator is every well-formed request offered: rejected, timed-out and failed ones count as not good.
One that its client cancelled is judged by what it got until then; without a first token it is not good.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from tandem.slo import SloClass

WINDOW_S = 60.0
"""Seconds over which goodput is counted."""


@dataclass(frozen=True, slots=True)
class ClassGoodput:
    """One class's figures; `goodput_rps` is good requests a second over the last minute."""

    slo: SloClass
    offered: int
    good: int
    goodput_rps: float


@dataclass(slots=True)
class _Tally:
    slo: SloClass
    offered: int
    good: int
    by_second: deque[tuple[int, int]]


class SloAccounting:
    """Counts by class."""

    def __init__(self, classes: Iterable[SloClass], started_s: float) -> None:
        self._tallies = {slo.name: _Tally(slo, 0, 0, deque()) for slo in classes}
        self._started_s = started_s

    def offered(self, name: str) -> None:
        """A well-formed request of this class arrived. Raises KeyError for an unknown class."""
        self._tallies[name].offered += 1

    def good(self, name: str, now_s: float) -> None:
        """A request of this class met all its objectives. Raises KeyError for an unknown class."""
        tally = self._tallies[name]
        tally.good += 1
        second = int(now_s)
        if tally.by_second and tally.by_second[-1][0] == second:
            tally.by_second[-1] = (second, tally.by_second[-1][1] + 1)
        else:
            tally.by_second.append((second, 1))
        self._forget_old(tally, now_s)

    def figures(self, now_s: float) -> tuple[ClassGoodput, ...]:
        """All classes; a router younger than the window divides by its age."""
        # The oldest second is kept whole, so the window is up to a second longer than WINDOW_S.
        span_s = max(1.0, now_s - max(self._started_s, int(now_s) - WINDOW_S))
        result = []
        for tally in self._tallies.values():
            self._forget_old(tally, now_s)
            lately = sum(count for _, count in tally.by_second)
            result.append(ClassGoodput(tally.slo, tally.offered, tally.good, lately / span_s))
        return tuple(result)

    @staticmethod
    def _forget_old(tally: _Tally, now_s: float) -> None:
        while tally.by_second and tally.by_second[0][0] <= now_s - WINDOW_S - 1:
            tally.by_second.popleft()
