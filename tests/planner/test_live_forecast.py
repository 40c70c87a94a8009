"""Pure: the forecast of a pair of workers that slow each other down."""

import pytest

from planner.latency import PromptPart, StepShape
from planner.live_forecast import PairLimits, forecast
from planner.live_profile import company_profile, transfer_model
from planner.profile_model import ProfileModel
from planner.shared_machine import DecodeSteps, PromptSteps, SharedMachine
from planner.simulator import simulate
from planner.simulator_setup import RouterRules, Setup, SimRole, WorkerSpec
from planner.workload import SimRequest
from tandem.ids import WorkerId
from tandem.slo import SloClass
from tests.planner.live_profiles import live_profile, transfers

PREFILL, DECODE = SimRole.PREFILL, SimRole.DECODE
SLO = SloClass("interactive", 1.0, 0.1, 1.0)


def asked(*rows: tuple[float, int, int]) -> list[SimRequest]:
    return [SimRequest(number, *row, "interactive") for number, row in enumerate(rows)]


def test_a_lone_request_meets_nobody() -> None:
    found = forecast(live_profile(), asked((0.0, 100, 11)), SLO, PairLimits())
    assert found.ttft_s == pytest.approx((0.1 + 0.005,))
    transfer_s = transfer_model(live_profile()).transfer_s(100, same_node=True)
    assert found.tpot_s == pytest.approx(((transfer_s + 10 * 0.02) / 10,))


def test_a_prompt_beside_a_decode_takes_as_long_as_measured_in_company() -> None:
    found = forecast(live_profile(), asked((0.0, 100, 200), (0.5, 100, 1)), SLO, PairLimits())
    assert found.ttft_s[0] == pytest.approx(0.2 + 0.005)


def test_decodes_slow_down_while_a_prompt_is_read_only() -> None:
    lonely = forecast(live_profile(), asked((0.0, 100, 50)), SLO, PairLimits())
    joined = forecast(live_profile(), asked((0.0, 100, 50), (0.5, 200, 1)), SLO, PairLimits())
    added_s = 49 * (max(joined.tpot_s) - lonely.tpot_s[0])
    # A prompt of 0.4 s takes half of the pace of the decodes beside it, up to a step at either end.
    assert added_s == pytest.approx(0.2, abs=0.03)


def test_company_that_costs_nothing_changes_nothing() -> None:
    rows = asked((0.0, 100, 50), (0.2, 100, 20), (0.3, 50, 5))
    same = live_profile(slower=1.0).model_copy(update={"in_company_transfers": transfers(0.01)})
    together = forecast(same, rows, SLO, PairLimits())
    model = ProfileModel(same)
    workers = tuple(WorkerSpec(WorkerId(role.value), role, model, 1024) for role in (PREFILL, DECODE))
    apart = simulate(Setup(workers, RouterRules((SLO,)), transfer_model(same)), rows).records.times
    assert together.ttft_s == pytest.approx([time_s + 0.005 for time_s in apart["ttft_s"]])
    assert together.tpot_s == pytest.approx(list(apart["tpot_s"]))


def test_a_step_that_outlasts_its_company_goes_on_alone() -> None:
    machine = SharedMachine(prefill_until_s=0.01)
    alone, company = ProfileModel(live_profile()), ProfileModel(company_profile(live_profile()))
    took_s = DecodeSteps(machine, alone, company).step_s(StepShape((), 1, 100))
    assert took_s == pytest.approx(0.01 + (1 - 0.01 / 0.04) * 0.02)


def test_a_prompt_is_slow_while_decode_steps_follow_each_other() -> None:
    machine = SharedMachine(now_s=lambda: 1.0, decode_until_s=1.0)
    alone, company = ProfileModel(live_profile()), ProfileModel(company_profile(live_profile()))
    steps = PromptSteps(machine, alone, company)
    assert steps.step_s(StepShape((PromptPart(100),))) == pytest.approx(0.2)
    machine.decode_until_s = 0.9
    assert steps.step_s(StepShape((PromptPart(100),))) == pytest.approx(0.1)


def test_missed_objectives_lower_the_attainment() -> None:
    slow_door = forecast(live_profile(door_s=0.95), asked((0.0, 100, 5), (5.0, 10, 5)), SLO, PairLimits())
    assert slow_door.attainment == 0.5
