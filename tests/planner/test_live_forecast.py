"""Pure: the forecast of a pair of workers that slow each other down."""

import pytest

from planner.forecast.live_forecast import PairLimits, forecast
from planner.forecast.live_profile import transfer_model
from planner.forecast.live_rehearsal import Rehearsed, rehearsed
from planner.forecast.shared_machine import SharedMachine, Side
from planner.latency import PromptPart, StepShape
from planner.simulation.setup import RouterRules, Setup, SimRole, WorkerSpec
from planner.simulator import simulate
from planner.step_times.profile_model import ProfileModel
from planner.workloads.workload import SimRequest
from tandem.errors import InvalidRequest
from tandem.ids import WorkerId
from tandem.slo import SloClass
from tests.planner.live_profiles import LONG, SHORT, live_profile

PREFILL, DECODE = SimRole.PREFILL, SimRole.DECODE
SLO = SloClass("interactive", 1.0, 0.1, 1.0)


def asked(*rows: tuple[float, int, int]) -> list[SimRequest]:
    return [SimRequest(number, *row, "interactive") for number, row in enumerate(rows)]


def test_a_lone_request_meets_nobody() -> None:
    found = forecast(live_profile(), asked((0.0, 100, 11)), SLO, PairLimits())
    assert found.ttft_s == pytest.approx({0: 0.1 + 0.005})
    transfer_s = transfer_model(live_profile()).transfer_s(100, same_node=True)
    assert found.tpot_s == pytest.approx({0: (transfer_s + 10 * 0.02) / 10})


def test_a_prompt_beside_decodes_takes_as_long_as_measured_in_company() -> None:
    found = forecast(live_profile(), asked((0.0, 100, 200), (0.5, 100, 1)), SLO, PairLimits())
    assert found.ttft_s[1] == pytest.approx(0.2 + 0.005, abs=1e-5)


def test_decodes_slow_down_while_a_prompt_is_read_and_no_longer() -> None:
    lonely = forecast(live_profile(), asked((0.0, 100, 50)), SLO, PairLimits())
    joined = forecast(live_profile(), asked((0.0, 100, 50), (0.5, 200, 1)), SLO, PairLimits())
    added_s = 49 * (joined.tpot_s[0] - lonely.tpot_s[0])
    # A prompt of 0.2 s at half pace is read for 0.4 s, in which the decodes do the work of 0.2 s.
    assert added_s == pytest.approx(0.2, abs=1e-4)


def test_a_prompt_goes_on_at_full_pace_when_its_company_ends() -> None:
    found = forecast(live_profile(), asked((0.0, 10, 11), (0.1, 200, 1)), SLO, PairLimits())
    # The prompt does half of its work until the answer's ten steps are over.
    decode_ends_s = 0.01 + transfer_model(live_profile()).transfer_s(10, same_node=True) + 0.2
    shared_s = 2 * (decode_ends_s - 0.1)
    assert found.ttft_s[1] == pytest.approx(0.2 + shared_s / 2 + 0.005, abs=1e-4)


@pytest.mark.parametrize(
    ("prompt_tokens", "slower"), [(SHORT, 3.0), (LONG, 1.5), (SHORT // 2, 3.0), (100, 2.25)]
)
def test_a_decode_is_slowed_as_beside_prompts_of_that_length(prompt_tokens: int, slower: float) -> None:
    machine, now_s = SharedMachine(live_profile(slower=3.0, slower_beside_long=1.5)), 0.0
    machine.now_s = lambda: now_s
    machine.begin(Side.PREFILL, StepShape((PromptPart(prompt_tokens),)))
    assert machine.begin(Side.DECODE, StepShape((), 1, 100)) == pytest.approx(0.02)
    now_s = 0.02
    assert machine.left_s(Side.DECODE) == pytest.approx(0.02 * (1 - 1 / slower))


def test_a_handoff_holds_up_the_steps_that_it_meets() -> None:
    rows = asked((0.0, 100, 50), (0.5, 100, 3), (0.51, 300, 2))
    free = forecast(live_profile(slower=1.0), rows, SLO, PairLimits())
    costly = live_profile(slower=1.0, handoff_prefill_s=0.02, handoff_decode_s=0.01)
    held_up = forecast(costly, rows, SLO, PairLimits())
    # Of the first answer no step was under way; each of the two others held up one step of it.
    assert 49 * (held_up.tpot_s[0] - free.tpot_s[0]) == pytest.approx(0.02, abs=1e-4)
    # The third prompt was being read when the second was handed over.
    assert held_up.ttft_s[2] - free.ttft_s[2] == pytest.approx(0.02, abs=1e-4)


def test_company_that_costs_nothing_changes_nothing() -> None:
    rows = asked((0.0, 100, 50), (0.2, 100, 20), (0.3, 50, 5))
    same = live_profile(slower=1.0, company_transfer_s=0.01)
    together = forecast(same, rows, SLO, PairLimits())
    model = ProfileModel(same)
    workers = tuple(WorkerSpec(WorkerId(role.value), role, model, 1024) for role in (PREFILL, DECODE))
    apart = simulate(Setup(workers, RouterRules((SLO,)), transfer_model(same)), rows).records
    ttft_s = dict(zip(apart.numbers, apart.times["ttft_s"], strict=True))
    assert together.ttft_s == pytest.approx({number: time_s + 0.005 for number, time_s in ttft_s.items()})
    assert together.tpot_s == pytest.approx(dict(zip(apart.numbers, apart.times["tpot_s"], strict=True)))


def test_missed_objectives_lower_the_attainment() -> None:
    slow_door = forecast(live_profile(door_s=0.95), asked((0.0, 100, 5), (5.0, 10, 5)), SLO, PairLimits())
    assert slow_door.attainment == 0.5


def test_a_rehearsal_that_took_longer_makes_forecasts_longer() -> None:
    profile = live_profile(door_s=1e-9)
    rows = [SimRequest(number, float(number), 100, 11, "rehearsal") for number in range(3)]
    never = SloClass("rehearsal", 1e9, 1e9, 1e9)
    found = forecast(profile, rows, never, PairLimits())
    seen = [Rehearsed(row, found.ttft_s[row.number] + 0.03, found.tpot_s[row.number] + 0.005) for row in rows]
    wiser = rehearsed(profile, seen, PairLimits())
    assert (wiser.prefill_unrest_s, wiser.decode_unrest_s) == pytest.approx((0.03, 0.005))
    again = forecast(wiser, rows, never, PairLimits())
    assert again.ttft_s == pytest.approx({one.asked.number: one.ttft_s for one in seen})
    assert again.tpot_s == pytest.approx({one.asked.number: one.tpot_s for one in seen})


def test_a_rehearsal_without_answers_of_two_tokens_is_refused() -> None:
    alone = Rehearsed(SimRequest(0, 0.0, 100, 1, "rehearsal"), 0.1, 0.0)
    with pytest.raises(InvalidRequest, match="two tokens"):
        rehearsed(live_profile(), [alone], PairLimits())
