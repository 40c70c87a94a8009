"""Pure: what the roofline learns from measurements, and what it says where it has none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.latency import PromptPart, StepShape
from planner.step_times.convex_hull import ConvexHull
from planner.step_times.correction import CorrectedRoofline
from planner.step_times.hardware import device_named
from planner.step_times.model_shape import model_named
from planner.step_times.roofline import Layout, Roofline
from tests.planner.profiles import decode_s, profile, prompt_s


@pytest.fixture(scope="module")
def base() -> Roofline:
    return Roofline(model_named("smollm2"), Layout(device_named("cpu-2-cores")))


@pytest.fixture(scope="module")
def learned(base: Roofline) -> CorrectedRoofline:
    return CorrectedRoofline(base, profile().points)


def test_learned_times_are_much_closer_than_the_roofline(learned: CorrectedRoofline) -> None:
    for fit in learned.fits:
        assert fit.error < 0.1
        assert fit.error < fit.roofline_error / 2
        assert fit.regressor in ("ridge", "gradient boosting")


def test_steps_between_the_measured_ones_are_forecast(learned: CorrectedRoofline) -> None:
    assert learned.step_s(StepShape((PromptPart(200),))) == pytest.approx(prompt_s([(200, 0)]), rel=0.1)
    assert learned.step_s(StepShape((), 8, 8 * 300)) == pytest.approx(decode_s(8, 8 * 300), rel=0.1)


def test_outside_its_data_it_corrects_as_at_the_edge_and_says_so(
    learned: CorrectedRoofline, base: Roofline
) -> None:
    inside, edge, far = (StepShape((PromptPart(tokens),)) for tokens in (256, 512, 65_536))
    assert learned.caution(inside) is None
    caution = learned.caution(far)
    assert caution is not None
    assert "65536" in caution.message
    factor_at_edge = learned.step_s(edge) / base.step_s(edge)
    assert learned.step_s(far) == pytest.approx(factor_at_edge * base.step_s(far))
    assert learned.caution(StepShape((), 512, 512 * 100)) is not None


def test_with_too_few_points_it_is_the_roofline(base: Roofline) -> None:
    few = CorrectedRoofline(base, profile().points[:3])
    step = StepShape((PromptPart(100),))
    assert few.step_s(step) == base.step_s(step)
    assert few.fits[0].regressor == "none"
    assert few.caution(step) is not None


coordinates = st.tuples(st.integers(-50, 50).map(float), st.integers(-50, 50).map(float))


@given(st.lists(coordinates, min_size=1, max_size=12), coordinates)
def test_the_nearest_point_is_in_the_hull_and_nearer_than_any_corner(
    points: list[tuple[float, float]], asked: tuple[float, float]
) -> None:
    hull = ConvexHull(points)
    assert all(hull.contains(point) for point in points)
    nearest = hull.nearest(asked)
    assert hull.contains(nearest)
    assert hull.contains(asked) == (nearest == pytest.approx(asked, abs=1e-9))
    distance = (nearest[0] - asked[0]) ** 2 + (nearest[1] - asked[1]) ** 2
    assert all(distance <= (x - asked[0]) ** 2 + (y - asked[1]) ** 2 + 1e-9 for x, y in points)
