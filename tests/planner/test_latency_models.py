"""Pure: what every latency model must answer, whatever its numbers come from."""

from collections.abc import Callable

import pytest

from planner.latency import LatencyModel, PromptPart, StepShape
from planner.step_times.correction import CorrectedRoofline
from planner.step_times.hardware import device_named
from planner.step_times.micro_batches import MicroBatches
from planner.step_times.model_shape import model_named
from planner.step_times.operator_tables import ComposedModel, OperatorTable
from planner.step_times.profile_model import ProfileModel
from planner.step_times.roofline import Layout, Roofline
from planner.step_times.transfer_links import link_of_rate
from tests.planner.distserve_figures import opt_13b
from tests.planner.operator_rows import ROWS
from tests.planner.profiles import profile


def _roofline(tp: int = 1, pp: int = 1) -> Roofline:
    return Roofline(model_named("opt-13b"), Layout(device_named("a100-80g"), tp, pp))


def _corrected() -> CorrectedRoofline:
    cpu = Roofline(model_named("smollm2"), Layout(device_named("cpu-2-cores")))
    return CorrectedRoofline(cpu, profile().points)


def _composed(tp: int = 1, pp: int = 1) -> ComposedModel:
    link = link_of_rate(300e9, 20e-6)
    layout = Layout(device_named("a100-80g"), tp, pp)
    return ComposedModel(model_named("llama-2-7b"), layout, OperatorTable(ROWS, tp), link, link)


MODELS: dict[str, Callable[[], LatencyModel]] = {
    "distserve fit": opt_13b,
    "distserve fit, two stages": lambda: opt_13b(2, 2),
    "roofline": _roofline,
    "roofline, tp 2 and pp 4": lambda: _roofline(2, 4),
    "corrected roofline": _corrected,
    "measured profile": lambda: ProfileModel(profile()),
    "operator tables": _composed,
    "two stages with micro-batches": lambda: MicroBatches(opt_13b(2, 2), 2),
    "operator tables, pp 2": lambda: _composed(1, 2),
}


@pytest.fixture(params=list(MODELS), scope="module")
def model(request: pytest.FixtureRequest) -> LatencyModel:
    return MODELS[request.param]()


def test_an_empty_step_takes_no_time(model: LatencyModel) -> None:
    assert model.step_s(StepShape()) == 0
    assert model.stage_s(StepShape()) == 0
    assert model.decode_run_s(0, 0, 10) == 0
    assert model.decode_steps_within(0, 0, 1.0) == 0


@pytest.mark.parametrize(("batch", "context", "steps"), [(1, 100, 1), (8, 4000, 57), (96, 30_000, 300)])
def test_a_decode_run_is_the_sum_of_its_steps(
    model: LatencyModel, batch: int, context: int, steps: int
) -> None:
    shapes = [StepShape((), batch, context + number * batch) for number in range(steps)]
    assert model.decode_run_s(batch, context, steps) == pytest.approx(
        sum(map(model.step_s, shapes)), rel=1e-9
    )


@pytest.mark.parametrize("within_s", [0.0, 0.001, 0.5, 10.0])
def test_steps_within_is_the_inverse_of_a_run(model: LatencyModel, within_s: float) -> None:
    steps = model.decode_steps_within(8, 4000, within_s)
    assert model.decode_run_s(8, 4000, steps) <= within_s
    assert model.decode_run_s(8, 4000, steps + 1) > within_s


def test_longer_prompts_and_more_context_take_longer(model: LatencyModel) -> None:
    short, long = (model.step_s(StepShape((PromptPart(tokens),))) for tokens in (128, 1024))
    assert 0 < short < long
    assert model.step_s(StepShape((PromptPart(128, 2048),))) > short
    assert model.step_s(StepShape((), 4, 8000)) > model.step_s(StepShape((), 4, 80)) > 0


def test_a_mixed_step_takes_longer_than_either_part(model: LatencyModel) -> None:
    prompts = (PromptPart(512),)
    mixed = model.step_s(StepShape(prompts, 16, 8000))
    assert mixed > model.step_s(StepShape(prompts))
    assert mixed >= model.step_s(StepShape((), 16, 8000))


def test_a_stage_is_never_longer_than_the_whole(model: LatencyModel) -> None:
    shape = StepShape((PromptPart(300),))
    assert 0 < model.stage_s(shape) <= model.step_s(shape)
