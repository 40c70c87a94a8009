"""Plans name the blocks that hand-offs wrote, for whoever keeps facts about their content."""

from engine.kv.blocks import BlockPool
from tandem.ids import BlockId
from tests.decode_worker.test_scheduler import finish, leg, scheduler, start


def test_a_plan_names_the_blocks_that_landed_since_the_last_one_with_their_tokens() -> None:
    legs = scheduler(BlockPool(16, 4))
    tokens = tuple(range(100, 110))
    start(legs, leg("a", tokens))
    first = legs.schedule(0.0)
    assert first is not None
    table = first.slices[0].block_table
    assert first.landed == ((table[0], 4), (table[1], 4), (table[2], 2))
    finish(legs, first)
    second = legs.schedule(0.0)
    assert second is not None
    assert second.landed == ()
    finish(legs, second)
    start(legs, leg("b", tokens))
    third = legs.schedule(0.0)
    assert third is not None
    assert third.landed == ((third.slices[1].block_table[2], 2),), "cached blocks landed before"


def test_blocks_that_landed_for_nobody_are_named_too() -> None:
    """They stay in the prefix cache, so that a later leg may read them."""
    legs = scheduler(BlockPool(16, 4))
    tokens = tuple(range(100, 110))
    legs.add(leg("a", tokens), 0.0)
    (reservation,) = legs.reserve(0.0)
    legs.cancel(reservation.leg_id)
    assert not legs.landed(reservation.leg_id, 0.0)
    start(legs, leg("b", tokens))
    plan = legs.schedule(0.0)
    assert plan is not None
    assert dict(plan.landed).keys() >= set(plan.slices[0].block_table[:3])


def test_blocks_that_were_adopted_are_those_of_the_leg() -> None:
    pool = BlockPool(16, 4, below=40)
    legs = scheduler(pool)
    tokens = tuple(range(100, 110))
    legs.add(leg("a", tokens), 0.0)
    (reservation,) = legs.reserve(0.0)
    came = tuple(BlockId(block) for block in (30, 20, 31))
    legs.exchanged(reservation.leg_id, tuple(zip(reservation.target_blocks, came, strict=True)))
    assert legs.landed(reservation.leg_id, 0.0)
    plan = legs.schedule(0.0)
    assert plan is not None
    assert tuple(plan.slices[0].block_table[:3]) == came
    assert [block for block, _ in plan.landed] == [*came]
    pool.check_integrity(legs.held_blocks())
    legs.cancel(reservation.leg_id)
    finish(legs, plan)
    assert pool.free_blocks == 16


def test_blocks_that_were_adopted_for_a_pull_that_failed_are_free_again() -> None:
    pool = BlockPool(16, 4, below=40)
    legs = scheduler(pool)
    legs.add(leg("a", tuple(range(100, 104))), 0.0)
    (reservation,) = legs.reserve(0.0)
    legs.exchanged(reservation.leg_id, ((reservation.target_blocks[0], BlockId(30)),))
    legs.failed(reservation.leg_id)
    pool.check_integrity([])
    assert BlockId(30) in pool.allocate(16)
