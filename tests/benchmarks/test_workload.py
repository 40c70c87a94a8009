"""Edge: planned loads: times stretched to a rate, lengths cut to a machine, prefixes shared."""

import random
from itertools import islice

import pytest

from benchmarks.workload import (
    FIRST_PLAIN_TOKEN,
    Arrivals,
    LengthLimits,
    PlannedRequest,
    plan,
)
from planner.workloads.arrivals import ArrivalProcess
from planner.workloads.traces import TraceRow
from planner.workloads.workload import fixed_lengths
from tandem.errors import InvalidRequest

LIMITS = LengthLimits(scale=0.1, max_prompt_tokens=200, max_output_tokens=20, vocabulary_tokens=1000)
OWN_TIMES = Arrivals(ArrivalProcess.POISSON, None)
TIMED = (TraceRow(10.0, 500, 50), TraceRow(12.0, 9_000, 900), TraceRow(18.0, 1, 1))


def seeded(name: str) -> random.Random:
    return random.Random(f"7 {name}")


def planned(rows: tuple[TraceRow, ...], arrivals: Arrivals = OWN_TIMES) -> tuple[PlannedRequest, ...]:
    return plan(rows, arrivals, LIMITS, {"a": 1.0}, seeded)


def test_a_traces_own_times_count_from_its_start() -> None:
    assert [request.at_s for request in planned(TIMED)] == [0.0, 2.0, 8.0]


def test_a_traces_times_are_stretched_to_the_rate() -> None:
    times = [request.at_s for request in planned(TIMED, Arrivals(ArrivalProcess.POISSON, 1.0))]
    assert times == [0.0, 0.5, 2.0]


def test_lengths_are_scaled_then_cut_and_never_zero() -> None:
    requests = planned(TIMED)
    assert [len(request.token_ids) for request in requests] == [50, 200, 1]
    assert [request.output_tokens for request in requests] == [5, 20, 1]


def test_rows_without_times_need_a_rate() -> None:
    rows = tuple(islice(fixed_lengths(100, 10), 50))
    with pytest.raises(InvalidRequest, match="a rate is needed"):
        planned(rows)
    times = [request.at_s for request in planned(rows, Arrivals(ArrivalProcess.FIXED, 2.0))]
    assert times == [0.5 * number for number in range(1, 51)]


def test_equal_prefix_ids_give_equal_blocks_and_others_differ() -> None:
    rows = (
        TraceRow(0.0, 1500, 1, (0, 1, 2)),
        TraceRow(0.0, 1500, 1, (0, 1, 3)),
        TraceRow(0.0, 1500, 1, (4, 1, 2)),
    )
    first, second, third = (request.token_ids for request in planned(rows))
    block = 51
    assert first[: 2 * block] == second[: 2 * block]
    assert first[2 * block :] != second[2 * block :]
    assert first[:block] != third[:block]
    assert first[block:] == third[block:]


def test_tokens_are_plain_ones_of_the_vocabulary() -> None:
    for request in planned(TIMED):
        assert all(FIRST_PLAIN_TOKEN <= token < 1000 for token in request.token_ids)


def test_classes_come_in_their_shares_and_the_plan_is_reproducible() -> None:
    rows = tuple(TraceRow(float(number), 10, 10) for number in range(4000))
    requests = plan(rows, OWN_TIMES, LIMITS, {"a": 3.0, "b": 1.0, "never": 0.0}, seeded)
    shares = [request.slo_class for request in requests]
    assert 0.70 < shares.count("a") / len(shares) < 0.80
    assert shares.count("never") == 0
    assert requests == plan(rows, OWN_TIMES, LIMITS, {"a": 3.0, "b": 1.0, "never": 0.0}, seeded)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(InvalidRequest, match="shares"):
        plan(TIMED, OWN_TIMES, LIMITS, {"a": share}, seeded)
