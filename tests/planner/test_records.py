"""What is said of a simulation: rows, gaps, good requests."""

from planner.simulation.gap_log import GapLog
from planner.simulator import simulate
from tests.planner.clusters import disaggregated, load


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
