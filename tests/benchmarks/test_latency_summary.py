"""Pure: percentiles, goodput and its interval, against numbers worked out by hand or published."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.latency_summary import (
    Outcome,
    OutcomeKind,
    Spread,
    TokenArrival,
    spread,
    summarise,
)
from planner.statistics import percentile, wilson_interval
from tandem.slo import SloClass

SLO = SloClass("a", ttft_s=1.0, tpot_s=0.1, longest_gap_s=0.5)


def outcome(
    *arrivals: tuple[float, int], kind: OutcomeKind = OutcomeKind.COMPLETED, due_s: float = 0.0
) -> Outcome:
    tokens = tuple(TokenArrival(at_s, count) for at_s, count in arrivals)
    ended_s = tokens[-1].at_s if tokens else due_s + 1.0
    return Outcome(kind, "a", due_s, due_s + 0.25, ended_s, prompt_tokens=8, arrivals=tokens)


def test_percentiles_interpolate_between_ranks() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([5.0], 0.99) == 5.0
    three = spread([3.0, 1.0, 2.0])
    assert (three.mean, three.p50) == (2.0, 2.0)
    assert three.p90 == pytest.approx(2.8)
    assert three.p99 == pytest.approx(2.98)
    assert spread([]) == Spread(None, None, None, None)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentile_lies_within_the_values_and_grows_with_the_share(
    values: list[float], share: float
) -> None:
    values.sort()
    assert values[0] <= percentile(values, share) <= values[-1] + 1e-9
    assert percentile(values, share) <= percentile(values, 1.0)


@pytest.mark.parametrize(
    ("good", "offered", "low", "high"),
    # Newcombe 1998, table I, method 3 (score interval without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_ones(good: int, offered: int, low: float, high: float) -> None:
    assert wilson_interval(good, offered) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_of_nothing_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share(counts: tuple[int, int]) -> None:
    low, high = wilson_interval(*counts)
    assert 0.0 <= low <= counts[0] / counts[1] + 1e-12
    assert counts[0] / counts[1] - 1e-12 <= high <= 1.0


def test_times_of_one_request() -> None:
    one = outcome((0.5, 1), (0.8, 3), (1.0, 1))
    assert one.output_tokens == 5
    assert one.ttft_s == 0.5
    assert one.tpot_s == pytest.approx(0.125)
    assert one.gaps_s() == pytest.approx((0.3, 0.0, 0.0, 0.2))


def test_lone_token_has_no_tpot_and_is_good_by_its_ttft() -> None:
    assert outcome((0.5, 1)).tpot_s is None
    assert outcome((0.5, 1)).meets(SLO)


@pytest.mark.parametrize(
    "bad",
    [
        outcome((1.1, 1)),
        outcome((0.5, 1), (0.75, 1)),
        outcome((0.5, 1), (0.51, 50), (1.1, 1)),
        outcome(),
        outcome((0.5, 1), kind=OutcomeKind.FAILED),
        outcome(kind=OutcomeKind.REJECTED),
    ],
    ids=["ttft", "tpot", "gap", "no token", "failed", "rejected"],
)
def test_request_that_misses_any_objective_is_not_good(bad: Outcome) -> None:
    assert not bad.meets(SLO)


def test_goodput_counts_every_request_offered() -> None:
    outcomes = [
        outcome((0.5, 1), (0.55, 1)),
        outcome((2.5, 1), (2.55, 1), due_s=2.0),
        outcome((9.0, 1), (10.0, 1), due_s=2.0),
        outcome(kind=OutcomeKind.REJECTED, due_s=3.0),
        outcome(kind=OutcomeKind.TIMED_OUT, due_s=3.0),
        outcome(kind=OutcomeKind.FAILED, due_s=3.0),
    ]
    summary = summarise(outcomes, {"a": SLO})
    assert (summary.offered, summary.completed) == (6, 3)
    assert (summary.rejected, summary.timed_out, summary.failed) == (1, 1, 1)
    assert summary.duration_s == 10.0
    assert summary.output_tokens_per_s == pytest.approx(0.6)
    assert summary.prompt_tokens_per_s == pytest.approx(2.4)
    assert summary.largest_send_lag_s == pytest.approx(0.25)
    (only,) = summary.classes
    assert (only.offered, only.good) == (6, 2)
    assert only.attainment == pytest.approx(1 / 3)
    assert only.goodput_rps == pytest.approx(0.2)
    assert (only.attainment_low, only.attainment_high) == wilson_interval(2, 6)


def test_a_load_of_nothing_is_summarised_too() -> None:
    summary = summarise([], {"a": SLO})
    assert (summary.offered, summary.output_tokens_per_s, summary.ttft_s.p50) == (0, 0.0, None)
