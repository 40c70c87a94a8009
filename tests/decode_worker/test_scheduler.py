"""The decode scheduler: reservations, the batch, copy-on-write, preemption, cancelling, deadlines."""

import pytest

from decode_worker.scheduler import (
    DecodeLeg,
    DecodeOutcome,
    DecodeScheduler,
    LegState,
    Reservation,
    SampleStart,
)
from engine.kv.blocks import BlockPool
from engine.leg import DropReason
from engine.step import SampledToken, StepPlan, StepResult
from tandem.errors import InvalidRequest, Overloaded, PromptTooLong, ProtocolError
from tandem.ids import LegId
from tandem.sampling import FinishReason, SamplingParams

EOS = 0


def scheduler(pool: BlockPool, max_batch: int = 8, max_waiting: int = 16) -> DecodeScheduler:
    """A scheduler with a context of 64 tokens."""
    return DecodeScheduler(
        pool, max_batch=max_batch, max_waiting=max_waiting, context_tokens=64, eos_ids=(EOS,), chunk_tokens=4
    )


def leg(
    name: str,
    tokens: int | tuple[int, ...],
    *,
    samples: int | tuple[SampleStart, ...] = 1,
    params: SamplingParams | None = None,
    priority: int = 0,
    prompt_tokens: int | None = None,
    deadline_s: float = 1e9,
) -> DecodeLeg:
    """A leg; numbers make so many tokens that no other leg shares, and so many samples with a token 5."""
    first = 1000 * sum(map(ord, name))
    token_ids = tuple(range(first, first + tokens)) if isinstance(tokens, int) else tokens
    if isinstance(samples, int):
        samples = tuple(SampleStart(index, (5,)) for index in range(samples))
    return DecodeLeg(
        LegId(name),
        token_ids,
        prompt_tokens or len(token_ids),
        samples,
        params or SamplingParams(),
        priority,
        deadline_s,
    )


def start(legs: DecodeScheduler, *wanted: DecodeLeg) -> None:
    """Adds legs and lets them land at once."""
    for one in wanted:
        legs.add(one, 0.0)
    for reservation in legs.reserve(0.0):
        assert legs.landed(reservation.leg_id, 0.0)


def finish(legs: DecodeScheduler, plan: StepPlan | None, token_id: int = 5) -> DecodeOutcome:
    """Completes a plan with the same token everywhere."""
    assert plan is not None
    tokens = tuple(
        SampledToken(request.key, request.sample_index, token_id, None)
        for part in plan.slices
        for request in part.samples
    )
    return legs.complete(StepResult(plan.step, tokens, 0.1), 0.0)


def step(legs: DecodeScheduler, token_id: int = 5) -> DecodeOutcome:
    """One whole step."""
    return finish(legs, legs.schedule(0.0), token_id)


def test_leg_is_fetched_then_decodes_from_the_token_after_its_first() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    legs.add(leg("a", 6), 1.0)
    assert legs.schedule(1.0) is None
    (reservation,) = legs.reserve(3.0)
    assert (len(reservation.target_blocks), reservation.first_block, reservation.waited_s) == (2, 0, 2.0)
    assert legs.schedule(3.0) is None
    assert legs.landed(LegId("a"), 4.0)
    plan = legs.schedule(4.0)
    assert plan is not None
    (part,) = plan.slices
    assert (list(part.token_ids), part.start, len(part.block_table)) == ([5], 6, 2)
    (token,) = finish(legs, plan).tokens
    assert (token.output_index, token.token_id) == (1, 5)
    assert [token.output_index for _ in range(2) for token in step(legs).tokens] == [2, 3]
    last = step(legs, EOS).tokens[0]
    assert (last.finish, last.stop_token_id) == (FinishReason.STOP, EOS)
    assert legs.legs() == {}
    assert pool.allocated_blocks == 0


def test_cached_blocks_are_not_fetched_again() -> None:
    legs = scheduler(BlockPool(8, 4))
    tokens = tuple(range(100, 110))
    start(legs, leg("a", tokens))
    legs.add(leg("b", tokens), 0.0)
    (reservation,) = legs.reserve(0.0)
    assert (len(reservation.target_blocks), reservation.first_block) == (1, 2)


def test_wholly_cached_leg_is_reserved_without_target_blocks() -> None:
    legs = scheduler(BlockPool(8, 4))
    tokens = tuple(range(100, 108))
    start(legs, leg("a", tokens))
    legs.add(leg("b", tokens), 0.0)
    assert legs.reserve(2.0) == (Reservation(LegId("b"), (), 2, 2.0),)
    assert legs.landed(LegId("b"), 2.0)
    plan = legs.schedule(2.0)
    assert plan is not None
    assert plan.copies == ()
    assert len({part.block_table[2] for part in plan.slices}) == 2


def test_written_tokens_stay_cached_for_the_next_turn() -> None:
    legs = scheduler(BlockPool(8, 4))
    start(legs, leg("a", 6, params=SamplingParams(max_tokens=4)))
    tokens = [*leg("a", 6).token_ids, 5]
    while legs.holds(LegId("a")):
        tokens += [token.token_id for token in step(legs).tokens]
    legs.add(leg("b", (*tokens, 7)), 0.0)
    (reservation,) = legs.reserve(0.0)
    assert reservation.first_block == 2


def test_samples_share_full_blocks_and_copy_the_last_one() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    start(legs, leg("a", 6, samples=2))
    assert pool.allocated_blocks == 2
    plan = legs.schedule(0.0)
    assert plan is not None
    first, second = (part.block_table for part in plan.slices)
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert {target for _, target in plan.copies} == {first[1], second[1]}
    assert len({source for source, _ in plan.copies}) == 1
    finish(legs, plan)
    assert pool.allocated_blocks == 3
    plan = legs.schedule(0.0)
    assert plan is not None
    assert plan.copies == ()


def test_samples_of_a_leg_end_on_their_own() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    start(legs, leg("a", 6, samples=3))
    step(legs)
    legs.cancel(LegId("a"), (1,))
    assert [token.sample_index for token in step(legs).tokens] == [0, 2]
    legs.cancel(LegId("a"), (0, 2))
    assert legs.legs() == {}
    assert pool.allocated_blocks == 0


def test_several_known_tokens_are_fed_in_chunks_before_one_is_drawn() -> None:
    legs = scheduler(BlockPool(8, 4))
    start(legs, leg("a", 3, samples=(SampleStart(2, (11, 12, 13, 14, 15, 16)),)))
    plan = legs.schedule(0.0)
    assert plan is not None
    assert (list(plan.slices[0].token_ids), plan.slices[0].samples) == ([11, 12, 13, 14], ())
    assert finish(legs, plan).tokens == ()
    plan = legs.schedule(0.0)
    assert plan is not None
    assert (list(plan.slices[0].token_ids), plan.slices[0].start) == ([15, 16], 7)
    (token,) = finish(legs, plan).tokens
    assert (token.sample_index, token.output_index) == (2, 6)


def test_resumed_leg_counts_on_and_hands_its_history_to_the_sampler() -> None:
    legs = scheduler(BlockPool(8, 4))
    params = SamplingParams(presence_penalty=0.5, min_tokens=9)
    start(legs, leg("a", 6, prompt_tokens=4, params=params))
    plan = legs.schedule(0.0)
    assert plan is not None
    (request,) = plan.slices[0].samples
    assert (request.output_index, request.prompt_tokens, list(request.history)[-1]) == (3, 4, 5)
    assert request.banned == (EOS,)


def test_no_more_samples_are_fetched_than_the_batch_holds() -> None:
    legs = scheduler(BlockPool(32, 4), max_batch=3)
    for name, samples in (("a", 2), ("b", 2), ("c", 1)):
        legs.add(leg(name, 4, samples=samples), 0.0)
    assert [one.leg_id for one in legs.reserve(0.0)] == ["a"]
    legs.failed(LegId("a"))
    assert [one.leg_id for one in legs.reserve(0.0)] == ["b", "c"]


def test_leg_is_fetched_only_when_others_keep_room_to_grow() -> None:
    pool = BlockPool(6, 4)
    legs = scheduler(pool)
    start(legs, leg("a", 8))
    legs.add(leg("b", 12), 0.0)
    assert legs.reserve(0.0) == ()
    legs.cancel(LegId("a"))
    assert len(legs.reserve(0.0)) == 1


def test_lone_leg_may_take_the_whole_pool() -> None:
    legs = scheduler(BlockPool(2, 4))
    start(legs, leg("a", 7))
    assert len(step(legs).tokens) == 1


def test_order_of_reservations_is_priority_then_arrival() -> None:
    legs = scheduler(BlockPool(32, 4))
    for name, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 3)):
        legs.add(leg(name, 2, priority=priority), 0.0)
    assert [one.leg_id for one in legs.reserve(0.0)] == ["high", "first", "second", "low"]


def test_lowest_priority_then_youngest_gives_way_when_blocks_run_out() -> None:
    pool = BlockPool(6, 4)
    legs = scheduler(pool)
    start(legs, leg("old", 4), leg("urgent", 4, priority=1), leg("young", 4))
    step(legs)
    for _ in range(3):
        assert step(legs).dropped == ()
    outcome = step(legs)
    (drop,) = outcome.dropped
    assert (drop.leg_id, drop.reason, drop.sample_indices) == ("young", DropReason.PREEMPTED, (0,))
    assert {token.leg_id for token in outcome.tokens} == {"old", "urgent"}
    assert not legs.holds(LegId("young"))


def test_lone_sample_that_outgrows_the_pool_is_too_large() -> None:
    legs = scheduler(BlockPool(2, 4))
    start(legs, leg("a", 6))
    step(legs)
    step(legs)
    assert legs.schedule(7.0) is None
    assert legs.next_deadline_s() == 7.0
    (drop,) = legs.expire(7.0)
    assert (drop.leg_id, drop.reason) == ("a", DropReason.TOO_LARGE)
    assert legs.next_deadline_s() is None


def test_sample_waits_for_blocks_that_a_hand_off_holds() -> None:
    pool = BlockPool(5, 4)
    legs = scheduler(pool)
    start(legs, leg("a", 4))
    legs.add(leg("b", 4), 0.0)
    (reservation,) = legs.reserve(0.0)
    for _ in range(12):
        step(legs)
    assert legs.schedule(0.0) is None
    assert legs.holds(LegId("a"))
    legs.failed(reservation.leg_id)
    assert len(step(legs).tokens) == 1


def test_sample_in_flight_is_freed_at_complete_and_sends_nothing() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    start(legs, leg("a", 6))
    plan = legs.schedule(0.0)
    assert legs.cancel(LegId("a")) is False
    assert not legs.holds(LegId("a"))
    assert pool.allocated_blocks == 2
    assert finish(legs, plan) == DecodeOutcome((), ())
    assert pool.allocated_blocks == 0


def test_blocks_of_a_cancelled_pull_are_kept_until_it_has_stopped() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    legs.add(leg("a", 6, samples=2), 0.0)
    legs.reserve(0.0)
    assert legs.cancel(LegId("a"), (0,)) is False
    assert legs.cancel(LegId("a"), (1,)) is True
    assert legs.cancel(LegId("a")) is True
    assert not legs.holds(LegId("a"))
    assert pool.allocated_blocks == 2
    legs.failed(LegId("a"))
    legs.failed(LegId("a"))
    assert pool.allocated_blocks == 0


def test_pull_that_lands_after_its_cancel_is_freed() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    legs.add(leg("a", 6), 0.0)
    legs.reserve(0.0)
    legs.cancel(LegId("a"))
    assert legs.landed(LegId("a"), 0.0) is False
    assert pool.allocated_blocks == 0
    assert legs.schedule(0.0) is None


def test_sample_cancelled_while_waiting_never_joins() -> None:
    legs = scheduler(BlockPool(8, 4))
    legs.add(leg("a", 6, samples=2), 0.0)
    legs.cancel(LegId("a"), (0,))
    legs.reserve(0.0)
    legs.landed(LegId("a"), 0.0)
    assert [token.sample_index for token in step(legs).tokens] == [1]


def test_deadline_drops_legs_in_every_state() -> None:
    pool = BlockPool(16, 4)
    legs = scheduler(pool)
    start(legs, leg("running", 6, deadline_s=1.0))
    plan = legs.schedule(0.0)
    legs.add(leg("pulling", 6, deadline_s=2.0), 0.0)
    legs.reserve(0.0)
    legs.add(leg("waiting", 6, deadline_s=3.0), 0.0)
    assert legs.next_deadline_s() == 1.0
    assert legs.expire(0.5) == ()
    assert [(drop.leg_id, drop.reason) for drop in legs.expire(3.0)] == [
        ("running", DropReason.DEADLINE),
        ("pulling", DropReason.DEADLINE),
        ("waiting", DropReason.DEADLINE),
    ]
    assert legs.expire(4.0) == ()
    assert legs.legs() == {"running": LegState.RUNNING, "pulling": LegState.ABORTING}
    assert finish(legs, plan).tokens == ()
    legs.failed(LegId("pulling"))
    assert pool.allocated_blocks == 0


def test_full_queue_refuses_and_says_when_to_come_back() -> None:
    legs = scheduler(BlockPool(8, 4), max_waiting=1)
    legs.add(leg("a", 4), 0.0)
    with pytest.raises(Overloaded) as refusal:
        legs.add(leg("b", 4), 0.0)
    assert refusal.value.retry_after_s == 1.0


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (leg("a", 63), PromptTooLong, r"64 tokens .* context of 64"),
        (leg("a", 40), PromptTooLong, r"41 tokens .* the 32"),
        (leg("a", 4, prompt_tokens=5), InvalidRequest, "5 prompt tokens"),
        (leg("a", 4, samples=()), InvalidRequest, "needs samples"),
        (leg("a", 4, samples=(SampleStart(0, ()),)), InvalidRequest, "each sample a token"),
        (leg("a", 4, samples=9), InvalidRequest, "batch of 8"),
    ],
)
def test_leg_that_can_never_run_is_refused(bad: DecodeLeg, error: type[Exception], words: str) -> None:
    legs = scheduler(BlockPool(8, 4))
    with pytest.raises(error, match=words):
        legs.add(bad, 0.0)


def test_messages_out_of_place_are_protocol_errors() -> None:
    legs = scheduler(BlockPool(8, 4))
    legs.add(leg("a", 6), 0.0)
    for wrong in (
        lambda: legs.add(leg("a", 6), 0.0),
        lambda: legs.landed(LegId("a"), 0.0),
        lambda: legs.failed(LegId("a")),
        lambda: legs.complete(StepResult(1, (), 0.0), 0.0),
    ):
        with pytest.raises(ProtocolError):
            wrong()
    legs.reserve(0.0)
    legs.landed(LegId("a"), 0.0)
    legs.schedule(0.0)
    with pytest.raises(ProtocolError):
        legs.schedule(0.0)


def test_unknown_leg_is_ignored() -> None:
    legs = scheduler(BlockPool(8, 4))
    assert legs.cancel(LegId("x")) is False
    assert legs.landed(LegId("x"), 0.0) is False
    legs.failed(LegId("x"))


def test_sample_without_its_token_is_dropped_as_our_fault() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    start(legs, leg("a", 6))
    plan = legs.schedule(0.0)
    assert plan is not None
    (drop,) = legs.complete(StepResult(plan.step, (), 0.0), 0.0).dropped
    assert (drop.leg_id, drop.reason) == ("a", DropReason.INTERNAL)
    assert pool.allocated_blocks == 0
