"""Offers that grow: a long prompt's KV can be pulled while it is read, and is freed once in any case."""

import pytest

from engine.kv.blocks import BlockPool
from engine.leg import DropReason
from prefill_worker.scheduler import LegState, PrefillScheduler
from tandem.ids import LegId
from tandem.sampling import SamplingParams
from tests.prefill_worker.test_scheduler import EOS, finish, leg, scheduler

A = LegId("a")


def started(pool: BlockPool, tokens: int = 18) -> PrefillScheduler:
    """A scheduler whose leg "a" is in its first step of 8 tokens."""
    legs = scheduler(pool, overlap_min_tokens=16)
    legs.add(leg("a", tokens), 0.0)
    return legs


def test_a_long_leg_is_offered_in_its_first_step_and_grows_with_every_other() -> None:
    pool = BlockPool(8, 4)
    legs = started(pool)
    plan = legs.schedule(1.0)
    (offer,) = legs.take_opened()
    assert (offer.ready_blocks, len(offer.blocks), offer.kv_tokens, offer.epoch) == (0, 5, 18, 1)
    assert offer.growing
    assert not offer.stands
    assert legs.take_opened() == ()
    assert legs.finishing() == ()
    assert [grown.ready_blocks for grown in finish(legs, plan).grown] == [2]
    assert [grown.ready_blocks for grown in finish(legs, legs.schedule(2.0)).grown] == [4]
    last = legs.schedule(3.0)
    assert [(grown.leg_id, grown.ready_blocks) for grown in legs.finishing()] == [("a", 4)]
    outcome = finish(legs, last, now_s=4.0)
    assert outcome.grown == ()
    (whole,) = outcome.offered
    assert (whole.ready_blocks, whole.epoch, whole.stands, whole.growing) == (5, 1, True, False)
    assert legs.legs() == {A: LegState.PARKED}
    legs.release(A, committed=True)
    assert pool.allocated_blocks == 0


def test_cached_blocks_are_ready_from_the_start() -> None:
    pool = BlockPool(16, 4)
    legs = started(pool)
    for _ in range(3):
        finish(legs, legs.schedule(0.0))
    legs.take_opened()
    legs.release(A, committed=True)
    again = leg("a", 18)
    legs.add(again, 1.0)
    legs.schedule(1.0)
    (offer,) = legs.take_opened()
    assert offer.ready_blocks == offer.cached_tokens // 4 == 4


@pytest.mark.parametrize(
    ("tokens", "params"), [(15, SamplingParams()), (18, SamplingParams(max_tokens=1))], ids=["short", "ends"]
)
def test_a_leg_for_which_it_does_not_pay_is_offered_when_it_is_read(
    tokens: int, params: SamplingParams
) -> None:
    legs = scheduler(BlockPool(8, 4), overlap_min_tokens=16)
    legs.add(leg("a", tokens, params=params), 0.0)
    finish(legs, legs.schedule(0.0))
    assert legs.take_opened() == ()


def test_a_leg_whose_offer_is_lost_is_read_on_and_offered_anew() -> None:
    pool = BlockPool(8, 4)
    legs = started(pool)
    finish(legs, legs.schedule(0.0))
    legs.release(A)
    assert legs.legs() == {A: LegState.RUNNING}
    assert finish(legs, legs.schedule(0.0)).grown == ()
    last = legs.schedule(0.0)
    assert legs.finishing() == ()
    (offer,) = finish(legs, last).offered
    assert (offer.epoch, offer.stands, offer.growing) == (2, False, False)


def test_a_leg_that_was_handed_over_before_its_token_came_ends_with_it() -> None:
    pool = BlockPool(8, 4)
    legs = started(pool)
    for _ in range(2):
        finish(legs, legs.schedule(0.0))
    last = legs.schedule(0.0)
    legs.release(A, committed=True)
    assert legs.legs() == {A: LegState.HANDED}
    assert pool.allocated_blocks == 5
    outcome = finish(legs, last)
    assert [token.leg_id for token in outcome.tokens] == [A]
    assert [offer.stands for offer in outcome.offered] == [True]
    assert legs.legs() == {}
    assert pool.allocated_blocks == 0


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("released_first", [False, True])
def test_blocks_of_a_cancelled_leg_wait_for_the_step_and_for_the_pull(
    in_flight: bool, released_first: bool
) -> None:
    pool = BlockPool(8, 4)
    legs = started(pool)
    plan = legs.schedule(0.0)
    if not in_flight:
        finish(legs, plan)
    assert legs.cancel(A), "its offer is to be withdrawn"
    assert not legs.holds(A)
    if released_first:
        legs.release(A)
    assert pool.allocated_blocks == (5 if in_flight or not released_first else 0)
    if in_flight:
        assert finish(legs, plan).tokens == ()
    if not released_first:
        assert pool.allocated_blocks == 5
        legs.release(A)
    assert pool.allocated_blocks == 0
    assert legs.legs() == {}


def test_a_leg_that_ends_with_its_first_token_keeps_its_blocks_until_the_offer_is_withdrawn() -> None:
    pool = BlockPool(8, 4)
    legs = started(pool)
    for _ in range(2):
        finish(legs, legs.schedule(0.0))
    outcome = finish(legs, legs.schedule(0.0), token_id=EOS)
    assert outcome.offered == ()
    assert not legs.holds(A)
    assert legs.legs() == {A: LegState.WITHDRAWN}
    legs.release(A)
    assert pool.allocated_blocks == 0


def test_a_deadline_ends_a_growing_leg_but_not_the_pull_of_it() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool, overlap_min_tokens=16)
    legs.add(leg("a", 18, deadline_s=5.0), 0.0)
    finish(legs, legs.schedule(0.0))
    assert [drop.reason for drop in legs.expire(5.0)] == [DropReason.DEADLINE]
    assert legs.next_deadline_s() is None
    assert pool.allocated_blocks == 5
    legs.release(A)
    assert pool.allocated_blocks == 0
