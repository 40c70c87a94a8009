"""Pure: the controller over simulated clusters: it follows a shifting mix, and leaves a steady one alone."""

from collections.abc import Sequence

import pytest

from planner.control.controlled_simulation import Controlled, simulate_controlled
from planner.control.load_window import RolePlacement
from planner.workloads.workload import SimRequest
from tandem.errors import InvalidRequest
from tests.planner.controlled_cases import (
    CHAT,
    READ,
    RULES,
    WINDOW_S,
    WRITE,
    opt_capacity,
    placed,
    shifting_load,
    six_workers,
)


def controlled(prefill: int, asked: Sequence[SimRequest]) -> Controlled:
    return simulate_controlled(six_workers(prefill), asked, RULES, opt_capacity(), WINDOW_S)


def wanted_by(course: Controlled) -> list[RolePlacement]:
    """What was desired after each window."""
    return [decision.desired for decision in course.decisions]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_mix_that_shifts_twice_is_followed_within_three_windows_each(seed: int) -> None:
    minutes = 8
    asked = shifting_load([(CHAT, 60.0 * minutes), (READ, 60.0 * minutes), (WRITE, 60.0 * minutes)], seed)
    course = controlled(3, asked)
    wanted = wanted_by(course)
    assert set(wanted[:minutes]) == {placed("3+3")}
    assert set(wanted[minutes + 2 : 2 * minutes]) == {placed("4+2")}
    assert set(wanted[2 * minutes + 2 :]) == {placed("1+5")}


def test_attainment_comes_back_after_each_shift() -> None:
    asked = shifting_load([(CHAT, 480.0), (READ, 480.0), (WRITE, 540.0)], 1)
    course = controlled(3, asked)
    for last_of_phase in (7, 15, 23):
        attained = course.windows[last_of_phase].attainment
        assert attained is not None
        assert attained >= RULES.attainment


@pytest.mark.parametrize(("prefill", "mix"), [(3, CHAT), (1, WRITE)])
def test_two_steady_hours_flip_nothing(prefill: int, mix: tuple[int, int, float]) -> None:
    course = controlled(prefill, shifting_load([(mix, 7200.0)], 4))
    assert len(course.decisions) >= 119
    assert course.flips == ()


def test_a_flip_changes_nothing_before_its_time() -> None:
    asked = shifting_load([(CHAT, 120.0), (READ, 420.0)], 2)
    course = controlled(3, asked)
    alone = controlled(3, [request for request in asked if request.at_s < 200.0])
    assert course.flips
    assert course.flips[0].at_s >= 180.0
    assert course.windows[:2] == alone.windows[:2]


def test_no_request_is_lost_while_workers_flip() -> None:
    asked = shifting_load([(CHAT, 180.0), (READ, 420.0)], 3)
    course = controlled(3, asked)
    assert course.flips
    assert course.result.records.names("outcome").count("finished") == len(asked)


@pytest.mark.parametrize("window_s", [0.0, float("nan"), float("inf")])
def test_a_window_that_is_no_time_is_refused(window_s: float) -> None:
    with pytest.raises(InvalidRequest, match="positive window"):
        simulate_controlled(six_workers(3), shifting_load([(CHAT, 10.0)], 1), RULES, opt_capacity(), window_s)
