"""Pure: DistServe's coefficients give DistServe's times."""

import pytest

from planner.latency import PromptPart, StepShape
from planner.step_times.distserve_fit import read_fits
from tandem.errors import ConfigError
from tests.planner.distserve_figures import PROFILE, opt_13b


def test_a_prefill_is_the_published_quadratic() -> None:
    expected_ms = 18.10254647486372 + 0.1019122572698738 * 700 + 7.122264314252114e-06 * (500**2 + 200**2)
    step = StepShape((PromptPart(500), PromptPart(200)))
    assert opt_13b().step_s(step) == pytest.approx(expected_ms / 1e3)


@pytest.mark.parametrize(
    ("batch", "expected_ms"),
    [
        (94, 19.934702624895458 + 0.0006269356524350583 * 40_000 + 0.03850697740828398 * 94),
        (95, 7.1661889468253595 + 0.0005798000403396046 * 40_000 + 0.15831096191764046 * 95),
    ],
)
def test_decodes_have_one_fit_below_and_one_from_the_threshold_on(batch: int, expected_ms: float) -> None:
    assert opt_13b().step_s(StepShape((), batch, 40_000)) == pytest.approx(expected_ms / 1e3)


def test_a_pipeline_starts_the_next_step_after_one_stage() -> None:
    step = StepShape((PromptPart(500),))
    model = opt_13b(pp=4)
    assert model.step_s(step) == opt_13b().step_s(step)
    assert model.stage_s(step) == pytest.approx(model.step_s(step) / 4)


def test_chunks_of_a_prompt_cost_its_square_once_and_the_constant_each_time() -> None:
    model = opt_13b()
    whole = model.step_s(StepShape((PromptPart(1000),)))
    chunks = sum(model.step_s(StepShape((PromptPart(250, done),))) for done in range(0, 1000, 250))
    assert chunks - whole == pytest.approx(3 * 18.10254647486372e-3)


@pytest.mark.parametrize(
    "broken", [{"m": {"1": {}}}, {"m": 3}, {"m": {"x": PROFILE["facebook/opt-13b"]["1"]}}]
)
def test_another_file_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="not a profile in DistServe's form"):
        read_fits(broken)
