"""Pure: what the online controller wants after each window, and the replay of its log, byte for byte."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.control.controller import (
    Action,
    ActionKind,
    Controller,
    ControllerRules,
    Decision,
    RoleRange,
    Verdict,
    difference,
)
from planner.control.load_window import LoadWindow, RolePlacement
from planner.control.log import entry_line, head_line, replay
from planner.control.role_capacity import Capacity
from tandem.errors import ConfigError, InvalidRequest
from tests.planner.controlled_cases import placed

RULES = ControllerRules(fewest=2, most=6, patience=2, dwell_s=180.0)
READING, WRITING = (1000, 10), (10, 1000)


def by_lengths(lengths: tuple[tuple[int, int], ...]) -> Capacity:
    """A prefill worker reads 10,000 tokens a second, a decode worker writes 10,000."""
    prompt = sum(pair[0] for pair in lengths) / len(lengths)
    output = sum(pair[1] for pair in lengths) / len(lengths)
    return lambda one: min(10_000 * one.prefill / prompt, 10_000 * one.decode / output)


def window(
    number: int,
    now: RolePlacement,
    rate_rps: float = 10.0,
    lengths: tuple[int, int] = (500, 500),
    attainment: float | None = 1.0,
) -> LoadWindow:
    """Minute `number` of a load."""
    began_s = 60.0 * number
    return LoadWindow(began_s, began_s + 60.0, round(60 * rate_rps), (lengths,), attainment, 0.5, 0.5, now)


def told(windows: Sequence[LoadWindow], rules: ControllerRules = RULES) -> list[Decision]:
    controller = Controller(rules, by_lengths)
    return [controller.decide(one) for one in windows]


def test_an_enough_placement_stays() -> None:
    decisions = told([window(number, placed("2+2"), 30.0) for number in range(20)])
    assert {decision.verdict for decision in decisions} == {Verdict.ENOUGH}
    assert not any(decision.changed for decision in decisions)


def test_one_short_window_is_noise() -> None:
    rates = [30.0, 90.0, 30.0, 30.0, 90.0]
    decisions = told([window(n, placed("2+2"), rate) for n, rate in enumerate(rates)])
    assert not any(decision.changed for decision in decisions)
    assert decisions[1].verdict is Verdict.WAITING


def test_flips_come_before_replicas() -> None:
    decisions = told([window(n, placed("2+2"), 25.0, READING) for n in range(2)])
    assert decisions[1].verdict is Verdict.SHORT
    assert decisions[1].actions == (Action(ActionKind.FLIP_TO_PREFILL, 1, True),)


def test_replicas_come_where_no_flip_is_enough() -> None:
    decisions = told([window(n, placed("2+2"), 45.0) for n in range(2)])
    assert decisions[1].desired == placed("3+3")
    assert {action.kind for action in decisions[1].actions} == {ActionKind.ADD_PREFILL, ActionKind.ADD_DECODE}


def test_a_cluster_that_cannot_flip_adds_replicas_instead() -> None:
    rules = replace(RULES, can_flip=False)
    decisions = told([window(n, placed("2+2"), 25.0, READING) for n in range(2)], rules)
    assert decisions[1].actions == (Action(ActionKind.ADD_PREFILL, 1, True),)


def test_a_cluster_that_can_do_nothing_is_told_what_is_wanted_all_the_same() -> None:
    rules = replace(RULES, can_flip=False, can_scale=False)
    decisions = told([window(n, placed("2+2"), 25.0, READING) for n in range(2)], rules)
    assert decisions[1].desired == placed("3+1")
    assert decisions[1].actions == (Action(ActionKind.FLIP_TO_PREFILL, 1, False),)


def test_missed_objectives_count_as_short_even_where_the_bound_sees_room() -> None:
    decisions = told([window(n, placed("1+3"), 5.0, READING, 0.5) for n in range(2)])
    assert decisions[1].desired.prefill > 1


def test_a_little_better_is_not_better() -> None:
    lengths = (550, 450)
    decisions = told([window(n, placed("3+3"), 60.0, lengths, 0.5) for n in range(4)])
    assert [decision.verdict for decision in decisions[1:]] == [Verdict.NO_BETTER] * 3


def test_workers_are_given_back_one_by_one_after_a_long_calm() -> None:
    decisions = told([window(n, placed("3+3"), 1.0) for n in range(RULES.calm_windows)])
    assert decisions[-2].verdict is Verdict.WAITING
    assert decisions[-1].verdict is Verdict.CALM
    assert decisions[-1].desired.total == 5


def test_nothing_came_nothing_changes() -> None:
    empty = replace(window(0, placed("1+3")), arrived=0, lengths=(), attainment=None)
    assert told([empty])[0].verdict is Verdict.IDLE


def test_a_role_keeps_to_its_range() -> None:
    rules = replace(RULES, prefill=RoleRange(1, 2), decode=RoleRange(2, 3))
    decisions = told([window(n, placed("2+2"), 45.0) for n in range(2)], rules)
    assert decisions[1].verdict is Verdict.NO_BETTER
    calm = told([window(n, placed("1+2"), 1.0) for n in range(RULES.calm_windows)], rules)
    assert not any(decision.changed for decision in calm)


def test_a_controller_goes_on_from_the_state_of_another_one() -> None:
    windows = [window(n, placed("2+2"), 25.0, READING) for n in range(8)]
    undisturbed = told(windows)
    decisions, state = [], None
    for one in windows:
        controller = Controller(RULES, by_lengths, state)
        decisions.append(controller.decide(one))
        state = controller.state
    assert decisions == undisturbed


@pytest.mark.parametrize(
    "wrong",
    [
        {"fewest": 1},
        {"most": 1},
        {"gain": 0.5},
        {"attainment": 1.0},
        {"patience": 0},
        {"dwell_s": -1.0},
        {"prefill": RoleRange(0, 4)},
        {"decode": RoleRange(3, 2)},
    ],
)
def test_rules_without_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Controller(ControllerRules(**({"fewest": 2, "most": 4} | wrong)), by_lengths)  # type: ignore[arg-type]


loads = st.lists(
    st.tuples(
        st.floats(0.0, 200.0),
        st.sampled_from([READING, WRITING, (500, 500), (100, 900)]),
        st.one_of(st.none(), st.floats(0.0, 1.0)),
        st.booleans(),
    ),
    max_size=40,
)
placements = st.builds(RolePlacement, st.integers(1, 4), st.integers(1, 4))


@given(loads, placements, st.booleans(), st.booleans(), st.sampled_from([0.0, 120.0, 600.0]))
def test_every_role_keeps_a_worker_and_changes_keep_their_distance(
    drawn: list[tuple[float, tuple[int, int], float | None, bool]],
    start: RolePlacement,
    can_flip: bool,
    can_scale: bool,
    dwell_s: float,
) -> None:
    rules = replace(RULES, can_flip=can_flip, can_scale=can_scale, dwell_s=dwell_s, calm_windows=3)
    controller, now = Controller(rules, by_lengths), start
    changed_s: list[float] = []
    for number, (rate_rps, lengths, attainment, obeyed) in enumerate(drawn):
        decision = controller.decide(window(number, now, rate_rps, lengths, attainment))
        assert decision.desired.valid
        assert decision.desired.total <= max(rules.most, now.total, start.total)
        if decision.changed:
            assert not changed_s or decision.at_s - changed_s[-1] >= dwell_s
            assert decision.actions == difference(now, decision.desired, rules)
            changed_s.append(decision.at_s)
        if obeyed and all(action.possible for action in decision.actions):
            now = decision.desired


@given(placements, placements)
def test_actions_lead_from_the_present_placement_to_the_desired_one(
    present: RolePlacement, target: RolePlacement
) -> None:
    counts = {action.kind: action.count for action in difference(present, target, RULES)}
    flipped = counts.get(ActionKind.FLIP_TO_PREFILL, 0) - counts.get(ActionKind.FLIP_TO_DECODE, 0)
    prefill = counts.get(ActionKind.ADD_PREFILL, 0) - counts.get(ActionKind.REMOVE_PREFILL, 0)
    decode = counts.get(ActionKind.ADD_DECODE, 0) - counts.get(ActionKind.REMOVE_DECODE, 0)
    assert present.prefill + flipped + prefill == target.prefill
    assert present.decode - flipped + decode == target.decode
    assert abs(prefill + decode) == abs(target.total - present.total)


@given(loads, placements)
def test_a_log_is_replayed_byte_for_byte(
    drawn: list[tuple[float, tuple[int, int], float | None, bool]], start: RolePlacement
) -> None:
    windows = [
        window(number, start, rate_rps, lengths, attainment)
        for number, (rate_rps, lengths, attainment, _) in enumerate(drawn)
    ]
    log = [head_line(RULES), *map(entry_line, windows, told(windows))]
    again = list(replay(log, by_lengths))
    assert [one.equal for one in again] == [True] * len(windows)


def test_a_log_in_which_controllers_followed_each_other_is_replayed_byte_for_byte() -> None:
    windows = [window(n, placed("2+2"), 25.0, READING) for n in range(6)]
    log, state = [], None
    for one in windows:
        controller = Controller(RULES, by_lengths, state)
        log += [head_line(RULES, state), entry_line(one, controller.decide(one))]
        state = controller.state
    again = list(replay(log, by_lengths))
    assert [one.equal for one in again] == [True] * len(windows)
    assert sum(one.decision.changed for one in again) == 1


def test_a_replay_says_where_the_decision_is_another_one() -> None:
    windows = [window(n, placed("2+2"), 25.0, READING) for n in range(2)]
    first, second = told(windows)
    log = [
        head_line(RULES),
        entry_line(windows[0], first),
        entry_line(windows[1], replace(second, actions=())),
    ]
    assert [one.equal for one in replay(log, by_lengths)] == [True, False]


@pytest.mark.parametrize(("line", "named"), [(b"", 1), (b"{}\n", 1), (b"\xff\n", 1)])
def test_a_file_that_is_no_log_is_refused_with_its_line(line: bytes, named: int) -> None:
    with pytest.raises(InvalidRequest, match=f"Line {named} of the controller's log"):
        list(replay([line], by_lengths))
