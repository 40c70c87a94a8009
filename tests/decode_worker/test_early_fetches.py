"""Early fetches: a leg's KV is pulled before its first tokens are known, and never at the cost of others."""

import pytest

from decode_worker.scheduler import DecodeLeg, LegState, LostPrefetch, SampleStart
from engine.kv.blocks import BlockPool
from tandem.errors import InvalidRequest, Overloaded, ProtocolError
from tandem.ids import LegId
from tests.decode_worker.test_scheduler import finish, leg, scheduler, start

E = LegId("e")


def early(tokens: int, *, name: str = "e", priority: int = 0, deadline_s: float = 1e9) -> DecodeLeg:
    """A leg whose one sample has no token yet."""
    return leg(name, tokens, samples=(SampleStart(0, ()),), priority=priority, deadline_s=deadline_s)


def test_it_joins_when_it_was_started_and_its_kv_is_here_whichever_comes_last() -> None:
    for kv_first in (True, False):
        legs = scheduler(BlockPool(8, 4))
        legs.prefetch(early(8), 0.0)
        legs.reserve(0.0)
        assert legs.fetched_early(E)
        if kv_first:
            assert not legs.landed(E, 0.0)
            assert legs.legs() == {E: LegState.LANDED}
            assert legs.schedule(0.0) is None
            assert legs.start(leg("e", 8))
        else:
            assert not legs.start(leg("e", 8))
            assert legs.landed(E, 0.0)
        assert legs.legs() == {E: LegState.RUNNING}
        plan = legs.schedule(0.0)
        assert plan is not None
        assert list(plan.slices[0].token_ids) == [5]


def test_it_waits_behind_every_leg_that_is_started() -> None:
    legs = scheduler(BlockPool(8, 4), max_batch=1)
    legs.prefetch(early(8, priority=9), 0.0)
    legs.add(leg("a", 8), 1.0)
    assert [taken.leg_id for taken in legs.reserve(1.0)] == ["a"]
    legs.add(leg("b", 8), 2.0)
    legs.start(leg("e", 8, priority=9))
    legs.cancel(LegId("a"))
    legs.failed(LegId("a"))
    assert [taken.leg_id for taken in legs.reserve(3.0)] == ["e"], "started, its priority counts"


@pytest.mark.parametrize("landed", [True, False])
def test_it_gives_way_to_samples_that_need_its_blocks(landed: bool) -> None:
    legs = scheduler(BlockPool(6, 4))
    start(legs, leg("a", 11))
    legs.prefetch(early(4), 0.0)
    legs.reserve(0.0)
    if landed:
        legs.landed(E, 0.0)
    for _ in range(20):
        plan = legs.schedule(0.0)
        if plan is None:
            break
        assert finish(legs, plan).dropped == ()
        if lost := legs.take_lost():
            assert [(one.leg_id, one.pulling) for one in lost] == [(E, not landed)]
            break
    assert not legs.fetched_early(E)
    assert legs.holds(LegId("a")), "nothing that runs was preempted for it"


def test_a_deadline_loses_it_without_dropping_the_leg() -> None:
    legs = scheduler(BlockPool(8, 4))
    legs.prefetch(early(8, deadline_s=5.0), 0.0)
    legs.reserve(0.0)
    assert legs.expire(5.0) == ()
    assert [type(lost) for lost in legs.take_lost()] == [LostPrefetch]
    assert legs.take_lost() == ()
    with pytest.raises(Overloaded):
        legs.add(leg("e", 8), 5.0)
    legs.failed(E)
    legs.add(leg("e", 8), 5.0)
    assert legs.legs() == {E: LegState.WAITING}


def test_what_is_not_fetched_early_cannot_be_started() -> None:
    legs = scheduler(BlockPool(8, 4))
    with pytest.raises(ProtocolError):
        legs.start(leg("e", 8))
    with pytest.raises(InvalidRequest):
        legs.prefetch(leg("e", 8), 0.0)
    legs.prefetch(early(8), 0.0)
    legs.start(leg("e", 8))
    with pytest.raises(ProtocolError):
        legs.start(leg("e", 8))
