"""Pure: what a load's outcomes say: percentiles, goodput, and how sure one can be of it.

Goodput is counted as in docs/architecture.md: a request is good iff it met all three objectives of its class;
the denominator is every request offered, rejected, timed out and failed ones included.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from planner.statistics import percentile, wilson_interval
from tandem.slo import SloClass


class OutcomeKind(Enum):
    """How a request ended."""

    COMPLETED = "completed"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class TokenArrival:
    """`tokens` tokens came together at `at_s`."""

    at_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request offered. Times are seconds on the load generator's clock; `due_s` is when it was planned.

    TTFT counts from `due_s`, not from the sending, so that a slow generator or server hides nothing.
    """

    kind: OutcomeKind
    slo_class: str
    due_s: float
    sent_s: float
    ended_s: float
    prompt_tokens: int
    arrivals: tuple[TokenArrival, ...] = ()
    detail: str = ""

    @property
    def output_tokens(self) -> int:
        """Tokens that came."""
        return sum(arrival.tokens for arrival in self.arrivals)

    @property
    def ttft_s(self) -> float | None:
        """None without a token."""
        return self.arrivals[0].at_s - self.due_s if self.arrivals else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None with fewer than two tokens."""
        later = self.output_tokens - 1
        return (self.arrivals[-1].at_s - self.arrivals[0].at_s) / later if later > 0 else None

    def gaps_s(self) -> tuple[float, ...]:
        """Time before each token after the first; tokens that came together have gaps of 0 between them."""
        gaps: list[float] = []
        for number, arrival in enumerate(self.arrivals):
            if number:
                gaps.append(arrival.at_s - self.arrivals[number - 1].at_s)
            gaps += [0.0] * (arrival.tokens - 1)
        return tuple(gaps)

    def meets(self, slo: SloClass) -> bool:
        """Whether it is good."""
        if self.kind is not OutcomeKind.COMPLETED or self.ttft_s is None:
            return False
        return (
            self.ttft_s <= slo.ttft_s
            and (self.tpot_s or 0.0) <= slo.tpot_s
            and max(self.gaps_s(), default=0.0) <= slo.longest_gap_s
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a set of durations in seconds; all None when the set is empty."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """Goodput of one class; `attainment_low` to `attainment_high` is the 95 % Wilson interval."""

    name: str
    ttft_s: float
    tpot_s: float
    longest_gap_s: float
    offered: int
    good: int
    attainment: float
    attainment_low: float
    attainment_high: float
    goodput_rps: float


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """All of a load. Spreads are over completed requests; rates are per second of `duration_s`."""

    offered: int
    completed: int
    rejected: int
    timed_out: int
    failed: int
    duration_s: float
    offered_rps: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft_s: Spread
    tpot_s: Spread
    itl_s: Spread
    largest_send_lag_s: float
    classes: tuple[ClassSummary, ...]


def spread(values: Iterable[float]) -> Spread:
    """Mean and percentiles."""
    ordered = sorted(values)
    if not ordered:
        return Spread(None, None, None, None)
    return Spread(
        math.fsum(ordered) / len(ordered),
        percentile(ordered, 0.5),
        percentile(ordered, 0.9),
        percentile(ordered, 0.99),
    )


def summarise(outcomes: Sequence[Outcome], classes: Mapping[str, SloClass]) -> LoadSummary:
    """`classes` has every class that an outcome names."""
    done = [outcome for outcome in outcomes if outcome.kind is OutcomeKind.COMPLETED]
    count = {kind: sum(outcome.kind is kind for outcome in outcomes) for kind in OutcomeKind}
    start_s = min((outcome.due_s for outcome in outcomes), default=0.0)
    duration_s = max((outcome.ended_s for outcome in outcomes), default=0.0) - start_s
    per_second = 1 / duration_s if duration_s > 0 else 0.0
    return LoadSummary(
        offered=len(outcomes),
        completed=count[OutcomeKind.COMPLETED],
        rejected=count[OutcomeKind.REJECTED],
        timed_out=count[OutcomeKind.TIMED_OUT],
        failed=count[OutcomeKind.FAILED],
        duration_s=duration_s,
        offered_rps=len(outcomes) * per_second,
        prompt_tokens_per_s=sum(outcome.prompt_tokens for outcome in done) * per_second,
        output_tokens_per_s=sum(outcome.output_tokens for outcome in outcomes) * per_second,
        ttft_s=spread(outcome.ttft_s for outcome in done if outcome.ttft_s is not None),
        tpot_s=spread(outcome.tpot_s for outcome in done if outcome.tpot_s is not None),
        itl_s=spread(gap_s for outcome in done for gap_s in outcome.gaps_s()),
        largest_send_lag_s=max((outcome.sent_s - outcome.due_s for outcome in outcomes), default=0.0),
        classes=tuple(
            _of_class(slo, [outcome for outcome in outcomes if outcome.slo_class == name], per_second)
            for name, slo in classes.items()
        ),
    )


def _of_class(slo: SloClass, outcomes: Sequence[Outcome], per_second: float) -> ClassSummary:
    good = sum(outcome.meets(slo) for outcome in outcomes)
    low, high = wilson_interval(good, len(outcomes))
    return ClassSummary(
        slo.name,
        slo.ttft_s,
        slo.tpot_s,
        slo.longest_gap_s,
        len(outcomes),
        good,
        good / len(outcomes) if outcomes else 0.0,
        low,
        high,
        good * per_second,
    )
