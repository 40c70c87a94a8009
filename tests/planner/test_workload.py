"""Simulated loads: distributions, traces at another rate, shared prefixes, the request log."""

import random
from itertools import islice

import pytest

from planner.workloads.request_log import is_request_log, read_request_log
from planner.workloads.traces import TraceRow
from planner.workloads.workload import (
    Lognormal,
    SimRequest,
    empirical_lengths,
    fixed_lengths,
    lognormal_lengths,
    prompt_ids,
    rate_scaled,
    requests,
)
from tandem.errors import InvalidRequest


def trace(*times_s: float) -> list[TraceRow]:
    return [TraceRow(time_s, 10, 5) for time_s in times_s]


def test_a_trace_is_stretched_to_the_rate() -> None:
    assert rate_scaled(trace(10.0, 11.0, 14.0), 0.5) == [0.0, 1.0, 4.0]
    assert rate_scaled(trace(10.0, 11.0, 14.0), None) == [0.0, 1.0, 4.0]
    assert rate_scaled(trace(10.0, 11.0, 14.0), 1.0) == [0.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("rows", "rate", "says"),
    [
        ([], 1.0, "empty"),
        (trace(2.0, 1.0), 1.0, "not sorted: request 2 comes at 1 s"),
        (trace(1.0, 2.0), -1.0, "rate must be positive"),
        (trace(1.0, 2.0), float("nan"), "rate must be positive"),
        (trace(1.0, 1.0), 1.0, "all requests|All requests"),
        ([TraceRow(None, 1, 1)], 1.0, "no arrival times"),
    ],
)
def test_a_trace_without_sense_is_refused_in_one_sentence(
    rows: list[TraceRow], rate: float, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        rate_scaled(rows, rate)


def test_lognormal_lengths_have_the_mean_asked() -> None:
    rows = lognormal_lengths(Lognormal(200.0, 0.5, 10_000), Lognormal(50.0, 1.0, 10_000), random.Random(1))
    drawn = list(islice(rows, 20_000))
    assert sum(row.prompt_tokens for row in drawn) / len(drawn) == pytest.approx(200.0, rel=0.02)
    assert sum(row.output_tokens for row in drawn) / len(drawn) == pytest.approx(50.0, rel=0.03)


def test_empirical_lengths_are_pairs_of_the_trace() -> None:
    rows = [TraceRow(0.0, 10, 1), TraceRow(1.0, 20, 2)]
    drawn = set(islice(empirical_lengths(rows, random.Random(1)), 50))
    assert drawn == {TraceRow(None, 10, 1), TraceRow(None, 20, 2)}


def test_lengths_below_one_token_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        fixed_lengths(0, 1)


def test_classes_come_in_their_shares() -> None:
    rows = islice(fixed_lengths(1, 1), 4000)
    made = requests(rows, range(4000), {"a": 1.0, "b": 3.0}, random.Random(2))
    count = sum(request.slo_class == "b" for request in made)
    assert count / 4000 == pytest.approx(0.75, abs=0.03)


def test_a_share_that_is_not_positive_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="positive share"):
        list(requests(fixed_lengths(1, 1), [0.0], {"a": 0.0}, random.Random(2)))


def test_equal_prefix_ids_give_equal_tokens_and_others_none_in_common() -> None:
    first = prompt_ids(SimRequest(0, 0.0, 1500, 1, "a", (7, 8)), shared=True)
    second = prompt_ids(SimRequest(1, 0.0, 1300, 1, "a", (7, 8)), shared=True)
    assert len(first) == 1500
    assert first[:1024] == second[:1024]
    assert not set(first[1024:]) & set(second[1024:])


def test_prompts_that_nobody_compares_cost_no_memory() -> None:
    assert prompt_ids(SimRequest(0, 0.0, 10**6, 1, "a"), shared=False) == range(10**6)


def test_the_request_log_is_read_in_order_of_arrival() -> None:
    lines = [
        '{"arrival_s": 2.5, "prompt_tokens": 5, "output_tokens": 3}\n',
        '{"arrival_s": 1.5, "prompt_tokens": 9, "output_tokens": 4}\n',
    ]
    assert is_request_log(lines[0])
    assert read_request_log(lines, None) == [TraceRow(1.5, 9, 4), TraceRow(2.5, 5, 3)]


@pytest.mark.parametrize(
    "line",
    [
        '{"arrival_s": 1}',
        '{"arrival_s": NaN, "prompt_tokens": 5, "output_tokens": 3}',
        '{"arrival_s": 1e999, "prompt_tokens": 5, "output_tokens": 3}',
        '{"arrival_s": 1, "prompt_tokens": Infinity, "output_tokens": 3}',
        f'{{"arrival_s": {10**400}, "prompt_tokens": 5, "output_tokens": 3}}',
        '{"arrival_s": 1, "prompt_tokens": 5, "output_tokens": -3}',
        '["arrival_s"]',
    ],
)
def test_a_broken_line_of_the_request_log_is_named(line: str) -> None:
    with pytest.raises(InvalidRequest, match="Line 1 "):
        read_request_log([line], None)
