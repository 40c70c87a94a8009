"""What is said of a simulation: Wilson's intervals, quantiles, gaps."""

import math

import pytest

from planner.gap_log import GapLog
from planner.records import attainment, quantile
from planner.simulator import simulate
from tests.planner.clusters import disaggregated, load


def test_wilson_interval_of_a_known_case() -> None:
    """81 of 263 (Newcombe 1998, table I): 0.2553 to 0.3662."""
    reached = attainment(81, 263)
    assert (round(reached.low, 4), round(reached.high, 4)) == (0.2553, 0.3662)


def test_interval_of_none_and_of_all_is_not_empty() -> None:
    assert attainment(0, 10).low == pytest.approx(0.0, abs=1e-12)
    assert 0.2 < attainment(0, 10).high < 0.4
    assert attainment(10, 10).high == pytest.approx(1.0)
    assert (attainment(0, 0).low, attainment(0, 0).high) == (0.0, 1.0)


def test_quantiles_are_interpolated() -> None:
    assert quantile([4.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.9) == 9.0
    assert math.isnan(quantile([], 0.5))


def test_the_longest_gap_is_that_of_the_steps_asked_for() -> None:
    gaps = GapLog()
    for step, gap_s in ((1, 5.0), (2, 1.0), (4, 3.0), (5, 2.0)):
        gaps.note(step, gap_s)
    assert [gaps.longest_s(step) for step in (1, 2, 4, 5, 6)] == [5.0, 3.0, 3.0, 2.0, 0.0]


def test_rows_are_in_order_of_the_requests_numbers() -> None:
    asked = load(30, 50.0, 5)
    lines = list(simulate(disaggregated(), asked).records.csv_lines())
    assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(30))
    assert len(lines) == 31


def test_good_requests_are_counted_over_all_offered() -> None:
    asked = load(30, 50.0, 5)
    records = simulate(disaggregated(), asked).records
    good, offered = records.good("chat")
    assert offered == 30
    assert good == records.names("slo_missed_by").count("")
