"""Pure: a run of decode steps answered at once is the sum of its steps, and can be turned round."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.step_times.decode_curve import DecodeCurve, Knot, straight
from tandem.errors import ConfigError

times = st.floats(1e-4, 1.0)


@st.composite
def curves(draw: st.DrawFn) -> DecodeCurve:
    contexts = draw(st.lists(st.integers(1, 5000), min_size=1, max_size=6, unique=True))
    return DecodeCurve([Knot(0.0, draw(times)), *(Knot(float(at), draw(times)) for at in sorted(contexts))])


@given(curves(), st.integers(1, 64), st.integers(0, 6000), st.integers(0, 300))
def test_a_run_is_the_sum_of_its_steps(curve: DecodeCurve, batch: int, context: int, steps: int) -> None:
    one_by_one = sum(curve.step_s(context + number * batch) for number in range(steps))
    assert curve.run_s(batch, context, steps) == pytest.approx(one_by_one, rel=1e-9, abs=1e-12)


@given(curves(), st.integers(1, 64), st.integers(0, 6000), st.floats(0.0, 20.0))
def test_steps_within_is_the_inverse_of_a_run(
    curve: DecodeCurve, batch: int, context: int, within_s: float
) -> None:
    steps = curve.steps_within(batch, context, within_s)
    assert curve.run_s(batch, context, steps) <= within_s * (1 + 1e-9) + 1e-12
    assert curve.run_s(batch, context, steps + 1) >= within_s * (1 - 1e-9) - 1e-12


def test_a_million_steps_of_a_straight_curve_are_one_series() -> None:
    curve = straight(0.02, 1e-6)
    steps = 1_000_000
    assert curve.run_s(4, 100, steps) == pytest.approx(
        steps * (0.02 + 100e-6) + 4e-6 * steps * (steps - 1) / 2, rel=1e-12
    )


def test_times_beyond_the_last_knot_do_not_fall() -> None:
    curve = DecodeCurve([Knot(0, 0.02), Knot(100, 0.01)])
    assert curve.step_s(50) == pytest.approx(0.015)
    assert curve.step_s(10_000) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "knots",
    [[], [Knot(5, 1.0), Knot(5, 2.0)], [Knot(0, 0.0)], [Knot(10, 0.1), Knot(11, 5.0)]],
    ids=["none", "not ascending", "no time", "negative below the first"],
)
def test_a_curve_that_makes_no_sense_is_refused(knots: list[Knot]) -> None:
    with pytest.raises(ConfigError):
        DecodeCurve(knots)
