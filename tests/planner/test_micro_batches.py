"""Pure: a pipeline's sequences get a token each time a micro-batch has passed all stages."""

import pytest

from planner.latency import StepShape
from planner.step_times.micro_batches import MicroBatches
from tests.planner.distserve_figures import opt_13b


def test_a_step_takes_as_long_as_one_micro_batch_through_all_stages() -> None:
    whole, piped = opt_13b(2, 4), MicroBatches(opt_13b(2, 4), 4)
    expected = whole.step_s(StepShape((), 16, 16 * 500))
    assert piped.step_s(StepShape((), 64, 64 * 500)) == pytest.approx(expected)


def test_one_sequence_gains_nothing() -> None:
    whole, piped = opt_13b(2, 4), MicroBatches(opt_13b(2, 4), 4)
    assert piped.step_s(StepShape((), 1, 0)) == whole.step_s(StepShape((), 1, 0))
