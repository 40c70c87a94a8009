"""Which blocks of a leg may change owners, and what the scheduler has of it afterwards."""

from engine.kv.blocks import BlockPool
from engine.step import SampledToken, StepResult
from prefill_worker.scheduler import PrefillLeg, PrefillScheduler
from tandem.ids import BlockId, LegId
from tandem.sampling import SamplingParams

LEG = LegId("leg")
STRANGE = (BlockId(20), BlockId(21), BlockId(22))


def scheduler(prefix_cache: bool = False) -> tuple[PrefillScheduler, BlockPool]:
    """With one leg of nine tokens in blocks of four, whose prompt is in a step."""
    pool = BlockPool(8, 4, prefix_cache, below=32)
    made = PrefillScheduler(pool, token_budget=16, max_waiting=4, context_tokens=64, eos_ids=())
    leg = PrefillLeg(LEG, range(9), 9, (0,), SamplingParams(max_tokens=4), 0, 60.0)
    made.add(leg, 0.0)
    assert made.schedule(0.0) is not None
    return made, pool


def read(made: PrefillScheduler) -> tuple[BlockId, ...]:
    """The step ends; the leg's blocks."""
    outcome = made.complete(StepResult(1, (SampledToken(1, 0, 5, None),), 0.1), 0.1)
    return outcome.offered[0].blocks


def test_blocks_that_a_step_touches_are_not_given() -> None:
    made, _ = scheduler()
    (table,) = made.held_blocks()
    assert not made.giving.may_give(LEG, table)
    read(made)
    assert made.giving.may_give(LEG, table)


def test_blocks_that_the_prefix_cache_keeps_are_not_given() -> None:
    made, _ = scheduler(prefix_cache=True)
    table = read(made)
    assert not made.giving.may_give(LEG, table[:1])
    assert made.giving.may_give(LEG, table[2:])


def test_what_came_for_given_blocks_is_free_when_the_offer_is_over() -> None:
    made, pool = scheduler()
    table = read(made)
    made.giving.gave(LEG, tuple(zip(table, STRANGE, strict=True)))
    assert made.held_blocks() == [STRANGE]
    pool.check_integrity(made.held_blocks())
    made.release(LEG, committed=True)
    pool.check_integrity([])
    assert pool.free_blocks == 8
    assert {*pool.allocate(8)} == {*map(BlockId, range(8))} - {*table} | {*STRANGE}


def test_blocks_of_a_leg_that_is_gone_are_not_given() -> None:
    made, _ = scheduler()
    table = read(made)
    made.release(LEG)
    assert not made.giving.may_give(LEG, table)
