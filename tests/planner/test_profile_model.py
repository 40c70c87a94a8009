"""Pure: a measured profile is reproduced at its points and interpolated between them."""

import copy

import pytest

from planner.latency import PromptPart, StepShape
from planner.step_times.profile_file import read_profile
from planner.step_times.profile_model import ProfileModel
from tandem.errors import ConfigError
from tests.planner.profiles import decode_s, profile, profile_document, prompt_s


@pytest.fixture(scope="module")
def model() -> ProfileModel:
    return ProfileModel(profile())


def test_measured_points_are_reproduced(model: ProfileModel) -> None:
    for point in profile().points:
        assert model.step_s(point.shape) == pytest.approx(point.seconds, rel=0.01)


@pytest.mark.parametrize("batch", [1, 2, 7, 20])
@pytest.mark.parametrize("context", [16, 60, 700])
def test_decodes_between_points_are_interpolated(model: ProfileModel, batch: int, context: int) -> None:
    assert model.step_s(StepShape((), batch, batch * context)) == pytest.approx(
        decode_s(batch, batch * context), rel=0.02
    )


def test_several_prompts_save_attention_over_one_of_the_same_tokens(model: ProfileModel) -> None:
    parts = [(100, 0), (200, 50), (60, 300)]
    step = StepShape(tuple(PromptPart(tokens, context) for tokens, context in parts))
    assert model.step_s(step) == pytest.approx(prompt_s(parts), rel=0.02)


@pytest.mark.parametrize("count", [1, 2, 4, 6, 64])
@pytest.mark.parametrize("tokens", [40, 300, 1400])
def test_prompts_follow_the_law_between_and_beyond_the_points(
    model: ProfileModel, count: int, tokens: int
) -> None:
    step = StepShape((PromptPart(tokens),) * count)
    assert model.step_s(step) == pytest.approx(prompt_s([(tokens, 0)] * count), rel=0.001)


def test_the_overhead_of_the_step_loop_is_in_every_step() -> None:
    document = profile_document() | {"step_overhead_s": 0.003}
    with_overhead, without = ProfileModel(read_profile(document, "test")), ProfileModel(profile())
    for step in (StepShape((PromptPart(100),)), StepShape((), 4, 400), StepShape((PromptPart(100),), 4, 400)):
        assert with_overhead.step_s(step) - without.step_s(step) == pytest.approx(0.003)


def test_mixed_points_scale_mixed_steps() -> None:
    document = copy.deepcopy(profile_document())
    mixed = StepShape((PromptPart(128),), 4, 400)
    plain_s = ProfileModel(profile()).step_s(mixed)
    document["points"].append(
        {"prompts": [[128, 0]], "decode_batch": 4, "decode_context_tokens": 400, "seconds": plain_s * 1.3}
    )
    assert ProfileModel(read_profile(document, "test")).step_s(mixed) == pytest.approx(plain_s * 1.3)


def test_beyond_its_points_it_says_so(model: ProfileModel) -> None:
    assert model.caution(StepShape((PromptPart(512),))) is None
    assert model.caution(StepShape((PromptPart(513),))) is not None
    assert model.caution(StepShape((), 33, 3300)) is not None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 2}, "version"),
        ({"points": []}, "points"),
        ({"points": [{"seconds": -1.0}, {"seconds": 1.0}]}, "points.0.seconds"),
        ({"kv_bytes_per_token": 0}, "kv_bytes_per_token"),
        ({"kind": "something"}, "kind"),
    ],
)
def test_a_file_with_a_fault_is_refused_by_the_name_of_its_key(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_profile(profile_document() | change, "file.json")


def test_a_profile_without_decode_points_is_refused() -> None:
    points = [point for point in profile_document()["points"] if "prompts" in point]
    with pytest.raises(ConfigError, match="only decode"):
        ProfileModel(read_profile(profile_document() | {"points": points}, "file.json"))
