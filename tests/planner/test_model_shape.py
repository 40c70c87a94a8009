"""Pure: what a model weighs and what fits beside it."""

import pytest

from planner.step_times.hardware import device_named
from planner.step_times.model_shape import kv_capacity_tokens, model_named
from planner.step_times.roofline import Layout, Roofline
from tandem.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "billions"),
    [("opt-13b", 12.9), ("opt-66b", 65.7), ("llama-2-7b", 6.74), ("llama-2-70b", 69.0), ("smollm2", 0.1345)],
)
def test_weights_are_the_published_sizes(name: str, billions: float) -> None:
    model = model_named(name)
    assert model.weight_bytes / model.value_bytes / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "devices", "published"), [("opt-13b", 1, 66144), ("opt-13b", 4, 356736), ("opt-66b", 4, 78496)]
)
def test_kv_capacity_is_near_distserves_table(name: str, devices: int, published: int) -> None:
    """DistServe's max_num_tokens.csv (Apache-2.0); it reserves less for the runtime the larger the worker
    is."""
    tokens = kv_capacity_tokens(model_named(name), device_named("a100-80g").memory_bytes, devices, 0.93)
    assert tokens == pytest.approx(published, rel=0.2)


def test_a_model_that_does_not_fit_has_no_room_for_kv() -> None:
    assert kv_capacity_tokens(model_named("opt-66b"), device_named("a100-80g").memory_bytes, 1, 0.9) <= 0


def test_a_model_cannot_be_cut_through_a_head_or_a_layer() -> None:
    with pytest.raises(ConfigError, match="72 heads"):
        Roofline(model_named("opt-66b"), Layout(device_named("h100"), tp=5))
    with pytest.raises(ConfigError, match="64 layers"):
        Roofline(model_named("opt-66b"), Layout(device_named("h100"), pp=65))


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="opt-13b"):
        model_named("gpt-9")
    with pytest.raises(ConfigError, match="a100-80g"):
        device_named("b900")
