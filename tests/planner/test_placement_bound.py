"""Pure: the formulas that decide what is worth simulating."""

import pytest

from planner.latency import StepShape
from planner.placements.bound import Bounds, Lengths
from planner.placements.placement import Candidate, Mode, Slo, WorkerKind
from tests.planner.placement_cases import LENGTHS, SLO, Opt13bWorkers

KIND = WorkerKind("a100-80g")
SLOW = WorkerKind("l4")


def _bounds(slo: Slo = SLO, lengths: Lengths = LENGTHS) -> Bounds:
    return Bounds(Opt13bWorkers(), lengths, slo, 256)


def test_more_workers_bear_more() -> None:
    one, two = (_bounds().prefill_rps(KIND, count) for count in (1, 2))
    assert two > 2 * one > 0


def test_a_slower_device_bears_less() -> None:
    bounds = _bounds(Slo(2.0, 0.2, 60.0, 0.9))
    assert bounds.prefill_rps(SLOW, 1) < bounds.prefill_rps(KIND, 1)
    assert bounds.decode(SLOW).rate_rps < bounds.decode(KIND).rate_rps


def test_an_objective_that_idle_prompts_miss_bears_nothing() -> None:
    impossible = Slo(0.01, 0.1, 60.0, 0.9)
    assert _bounds(impossible).prefill_rps(KIND, 4) == 0
    assert _bounds(Slo(0.25, 0.001, 60.0, 0.9)).decode(KIND).rate_rps == 0
    assert _bounds(impossible).rate_rps(Candidate(Mode.COLOCATED, KIND, 1)) == 0


def test_the_decode_batch_is_the_largest_whose_step_is_in_time() -> None:
    bounds = _bounds(Slo(0.25, 0.028, 60.0, 0.9), Lengths(((100, 100),) * 10))
    limit = bounds.decode(KIND)
    model = Opt13bWorkers().latency(KIND)
    assert model is not None
    now_s, more_s = (
        model.step_s(StepShape((), batch, batch * 150)) for batch in (limit.batch, limit.batch + 1)
    )
    assert now_s <= 0.028 < more_s
    assert limit.rate_rps == pytest.approx(limit.batch / (99 * limit.step_s))
    assert not limit.held_by_memory


def test_memory_holds_the_batch_of_long_contexts() -> None:
    limit = _bounds(SLO, Lengths(((1900, 100),) * 10)).decode(KIND)
    assert limit.held_by_memory
    assert limit.batch == 66_144 // 1950


def test_a_colocated_worker_bears_less_than_either_role_alone() -> None:
    bounds = _bounds()
    colocated = bounds.rate_rps(Candidate(Mode.COLOCATED, KIND, 1))
    assert 0 < colocated < min(bounds.prefill_rps(KIND, 1), bounds.decode(KIND).rate_rps)


def test_md1_waits_lower_the_bound_below_saturation() -> None:
    lengths = Lengths(((512, 10),) * 10)
    model = Opt13bWorkers().latency(KIND)
    assert model is not None
    tight, loose = (_bounds(Slo(ttft, 0.1, 60.0, 0.9), lengths).prefill_rps(KIND, 1) for ttft in (0.1, 5.0))
    assert tight < loose < 1 / 0.053
    assert loose == pytest.approx(1 / 0.054, rel=0.05)
