"""The prefill scheduler: order, chunks, blocks, first tokens, parking, cancelling, deadlines."""

import pytest

from engine.kv.blocks import BlockPool
from engine.leg import DropReason
from engine.step import SampledToken, StepPlan, StepResult
from prefill_worker.scheduler import LegState, PrefillLeg, PrefillOutcome, PrefillScheduler
from tandem.errors import InvalidRequest, Overloaded, PromptTooLong, ProtocolError
from tandem.ids import LegId
from tandem.sampling import FinishReason, SamplingParams

EOS = 0


def scheduler(
    pool: BlockPool, token_budget: int = 8, max_waiting: int = 16, overlap_min_tokens: int | None = None
) -> PrefillScheduler:
    """A scheduler with a context of 64 tokens."""
    return PrefillScheduler(
        pool,
        token_budget=token_budget,
        max_waiting=max_waiting,
        context_tokens=64,
        eos_ids=(EOS,),
        overlap_min_tokens=overlap_min_tokens,
    )


def leg(
    name: str,
    tokens: int | tuple[int, ...],
    *,
    samples: tuple[int, ...] = (0,),
    params: SamplingParams | None = None,
    priority: int = 0,
    prompt_tokens: int | None = None,
    deadline_s: float = 1e9,
) -> PrefillLeg:
    """A leg; `tokens` as a number makes that many that no other leg shares."""
    first = 1000 * sum(map(ord, name))
    token_ids = tuple(range(first, first + tokens)) if isinstance(tokens, int) else tokens
    return PrefillLeg(
        LegId(name),
        token_ids,
        prompt_tokens or len(token_ids),
        samples,
        params or SamplingParams(),
        priority,
        deadline_s,
    )


def fed(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """(start, tokens, samples) of each slice."""
    assert plan is not None
    return [(part.start, len(part.token_ids), len(part.samples)) for part in plan.slices]


def finish(
    legs: PrefillScheduler, plan: StepPlan | None, token_id: int = 5, now_s: float = 0.0
) -> PrefillOutcome:
    """Completes a plan with the same token everywhere."""
    assert plan is not None
    tokens = tuple(
        SampledToken(request.key, request.sample_index, token_id, None)
        for part in plan.slices
        for request in part.samples
    )
    return legs.complete(StepResult(plan.step, tokens, 0.1), now_s)


def test_prompt_is_read_in_chunks_and_then_offered() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    legs.add(leg("a", 18), 1.0)
    plan = legs.schedule(2.0)
    assert fed(plan) == [(0, 8, 0)]
    assert finish(legs, plan).tokens == ()
    plan = legs.schedule(3.0)
    assert fed(plan) == [(8, 8, 0)]
    finish(legs, plan)
    plan = legs.schedule(4.0)
    assert fed(plan) == [(16, 2, 1)]
    outcome = finish(legs, plan, now_s=5.0)
    assert [(token.output_index, token.token_id, token.finish) for token in outcome.tokens] == [(0, 5, None)]
    (offer,) = outcome.offered
    assert (offer.kv_tokens, len(offer.blocks), offer.cached_tokens) == (18, 5, 0)
    assert (offer.queue_s, offer.compute_s) == (1.0, 3.0)
    assert legs.legs() == {"a": LegState.PARKED}
    assert legs.load().parked_legs == 1
    legs.release(LegId("a"))
    legs.release(LegId("a"))
    assert pool.allocated_blocks == 0


def test_budget_goes_to_the_running_prompt_first_and_then_to_others() -> None:
    legs = scheduler(BlockPool(16, 4))
    legs.add(leg("long", 12), 0.0)
    finish(legs, legs.schedule(0.0))
    legs.add(leg("urgent", 3, priority=9), 0.0)
    legs.add(leg("next", 9), 0.0)
    assert fed(legs.schedule(0.0)) == [(8, 4, 1), (0, 3, 1), (0, 1, 0)]


def test_order_is_priority_then_arrival() -> None:
    legs = scheduler(BlockPool(16, 4), token_budget=2)
    for name, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 3)):
        legs.add(leg(name, 2, priority=priority), 0.0)
    order = [finish(legs, legs.schedule(0.0)).offered[0].leg_id for _ in range(4)]
    assert order == ["high", "first", "second", "low"]


def test_cached_prefix_is_not_computed_again_but_the_last_token_is() -> None:
    legs = scheduler(BlockPool(8, 4))
    tokens = tuple(range(8))
    legs.add(leg("a", tokens), 0.0)
    finish(legs, legs.schedule(0.0))
    legs.add(leg("b", tokens), 0.0)
    plan = legs.schedule(0.0)
    assert fed(plan) == [(4, 4, 1)]
    (offer,) = finish(legs, plan).offered
    assert (offer.kv_tokens, offer.cached_tokens) == (8, 4)


def test_prefix_is_not_shared_before_it_is_computed() -> None:
    legs = scheduler(BlockPool(16, 4), token_budget=12)
    tokens = tuple(range(20))
    legs.add(leg("a", tokens), 0.0)
    finish(legs, legs.schedule(0.0))
    legs.add(leg("b", tokens), 0.0)
    assert fed(legs.schedule(0.0)) == [(12, 8, 1), (12, 4, 0)]


def test_all_samples_draw_their_first_token_from_one_slice() -> None:
    legs = scheduler(BlockPool(8, 4))
    legs.add(leg("a", 3, samples=(0, 2)), 0.0)
    plan = legs.schedule(0.0)
    assert fed(plan) == [(0, 3, 2)]
    assert [token.sample_index for token in finish(legs, plan).tokens] == [0, 2]


def test_resumed_leg_draws_the_next_output_index_with_its_history() -> None:
    legs = scheduler(BlockPool(8, 4))
    params = SamplingParams(repetition_penalty=1.5, min_tokens=9, max_tokens=4)
    legs.add(leg("a", 7, prompt_tokens=4, params=params), 0.0)
    plan = legs.schedule(0.0)
    assert plan is not None
    (request,) = plan.slices[0].samples
    assert (request.output_index, request.prompt_tokens, len(request.history)) == (3, 4, 7)
    assert request.banned == (EOS,)
    outcome = finish(legs, plan)
    assert outcome.tokens[0].finish is FinishReason.LENGTH
    assert outcome.offered == ()


@pytest.mark.parametrize(
    ("params", "token_id", "reason"),
    [
        (SamplingParams(max_tokens=1), 5, FinishReason.LENGTH),
        (SamplingParams(), EOS, FinishReason.STOP),
        (SamplingParams(stop_token_ids=(5,)), 5, FinishReason.STOP),
    ],
)
def test_leg_that_ends_with_its_first_token_is_never_offered(
    params: SamplingParams, token_id: int, reason: FinishReason
) -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    legs.add(leg("a", 6, params=params), 0.0)
    outcome = finish(legs, legs.schedule(0.0), token_id)
    assert [token.finish for token in outcome.tokens] == [reason]
    assert outcome.offered == ()
    assert not legs.holds(LegId("a"))
    assert pool.allocated_blocks == 0


def test_last_token_of_the_context_ends_the_sample() -> None:
    legs = scheduler(BlockPool(16, 4), token_budget=64)
    legs.add(leg("a", 63), 0.0)
    assert finish(legs, legs.schedule(0.0)).tokens[0].finish is FinishReason.LENGTH


def test_leg_waits_for_blocks_and_starts_when_a_parked_one_is_released() -> None:
    legs = scheduler(BlockPool(4, 4), token_budget=64)
    legs.add(leg("a", 12), 0.0)
    legs.add(leg("b", 8), 0.0)
    finish(legs, legs.schedule(0.0))
    assert legs.schedule(0.0) is None
    assert legs.legs() == {"a": LegState.PARKED, "b": LegState.WAITING}
    legs.release(LegId("a"))
    assert fed(legs.schedule(0.0)) == [(0, 8, 1)]


def test_small_legs_pass_a_big_one_only_so_often() -> None:
    pool = BlockPool(5, 4)
    legs = PrefillScheduler(
        pool, token_budget=4, max_waiting=64, context_tokens=64, eos_ids=(EOS,), max_passed_by=3
    )
    legs.add(leg("parked", 4), 0.0)
    finish(legs, legs.schedule(0.0))
    legs.add(leg("big", 20), 0.0)
    once = SamplingParams(max_tokens=1)
    for number in range(10):
        legs.add(leg(f"small {number}", 4, params=once), 0.0)
    started = 0
    while (plan := legs.schedule(0.0)) is not None:
        finish(legs, plan)
        started += 1
    assert started == 3
    legs.release(LegId("parked"))
    assert fed(legs.schedule(0.0)) == [(0, 4, 0)]
    assert legs.legs()[LegId("big")] is LegState.RUNNING


def test_nothing_starts_while_parked_legs_hold_too_much() -> None:
    legs = PrefillScheduler(
        BlockPool(8, 4),
        token_budget=64,
        max_waiting=8,
        context_tokens=64,
        eos_ids=(EOS,),
        max_parked_fraction=0.25,
    )
    legs.add(leg("a", 12), 0.0)
    finish(legs, legs.schedule(0.0))
    legs.add(leg("b", 4), 0.0)
    assert legs.schedule(0.0) is None
    legs.release(LegId("a"))
    assert legs.schedule(0.0) is not None


def test_full_queue_refuses_and_says_when_to_come_back() -> None:
    legs = scheduler(BlockPool(8, 4), max_waiting=1)
    legs.add(leg("a", 4), 0.0)
    with pytest.raises(Overloaded) as refusal:
        legs.add(leg("b", 4), 0.0)
    assert refusal.value.retry_after_s == 1.0
    assert not legs.holds(LegId("b"))


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (leg("a", 64), PromptTooLong, r"64 tokens .* context of 64"),
        (leg("a", 40), PromptTooLong, r"40 tokens .* the 32"),
        (leg("a", 4, prompt_tokens=5), InvalidRequest, "5 prompt tokens"),
        (leg("a", ()), InvalidRequest, "prompt tokens"),
        (leg("a", 4, samples=()), InvalidRequest, "no sample"),
    ],
)
def test_leg_that_can_never_run_is_refused(bad: PrefillLeg, error: type[Exception], words: str) -> None:
    legs = scheduler(BlockPool(8, 4))
    with pytest.raises(error, match=words):
        legs.add(bad, 0.0)


def test_leg_in_flight_is_freed_at_complete_and_sends_nothing() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    legs.add(leg("a", 6), 0.0)
    plan = legs.schedule(0.0)
    assert legs.cancel(LegId("a")) is False
    assert legs.cancel(LegId("a")) is False
    assert not legs.holds(LegId("a"))
    assert pool.allocated_blocks == 2
    outcome = finish(legs, plan)
    assert outcome == PrefillOutcome((), (), ())
    assert pool.allocated_blocks == 0


def test_waiting_leg_is_cancelled_at_once() -> None:
    legs = scheduler(BlockPool(8, 4))
    legs.add(leg("a", 6), 0.0)
    legs.cancel(LegId("a"))
    assert legs.legs() == {}
    assert legs.schedule(0.0) is None


def test_parked_leg_is_kept_until_release_although_cancelled() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    legs.add(leg("a", 6, samples=(0, 1)), 0.0)
    finish(legs, legs.schedule(0.0))
    assert legs.cancel(LegId("a"), (0,)) is False
    assert legs.cancel(LegId("a"), (1,)) is True
    assert legs.cancel(LegId("a")) is True
    assert pool.allocated_blocks == 2
    legs.release(LegId("a"))
    assert pool.allocated_blocks == 0


def test_cancelled_sample_is_not_drawn_and_the_others_are() -> None:
    legs = scheduler(BlockPool(8, 4))
    legs.add(leg("a", 6, samples=(0, 1, 2)), 0.0)
    legs.cancel(LegId("a"), (1,))
    plan = legs.schedule(0.0)
    legs.cancel(LegId("a"), (2,))
    assert fed(plan) == [(0, 6, 2)]
    assert [token.sample_index for token in finish(legs, plan).tokens] == [0]


def test_unknown_leg_is_ignored() -> None:
    legs = scheduler(BlockPool(8, 4))
    assert legs.cancel(LegId("x")) is False
    legs.release(LegId("x"))


def test_deadline_drops_waiting_and_running_legs_but_not_parked_ones() -> None:
    pool = BlockPool(16, 4)
    legs = scheduler(pool)
    legs.add(leg("parked", 4, deadline_s=1.0), 0.0)
    finish(legs, legs.schedule(0.0))
    legs.add(leg("running", 20, deadline_s=2.0), 0.0)
    plan = legs.schedule(0.0)
    legs.add(leg("waiting", 4, deadline_s=3.0), 0.0)
    assert legs.next_deadline_s() == 2.0
    assert legs.expire(1.5) == ()
    dropped = legs.expire(3.0)
    assert [(drop.leg_id, drop.reason) for drop in dropped] == [
        ("waiting", DropReason.DEADLINE),
        ("running", DropReason.DEADLINE),
    ]
    assert legs.expire(4.0) == ()
    assert legs.next_deadline_s() is None
    finish(legs, plan)
    assert legs.legs() == {"parked": LegState.PARKED}
    assert pool.allocated_blocks == 1


def test_messages_out_of_place_are_protocol_errors() -> None:
    legs = scheduler(BlockPool(8, 4))
    legs.add(leg("a", 6), 0.0)
    with pytest.raises(ProtocolError):
        legs.add(leg("a", 6), 0.0)
    with pytest.raises(ProtocolError):
        legs.release(LegId("a"))
    with pytest.raises(ProtocolError):
        legs.complete(StepResult(1, (), 0.0), 0.0)
    plan = legs.schedule(0.0)
    assert plan is not None
    with pytest.raises(ProtocolError):
        legs.schedule(0.0)
    with pytest.raises(ProtocolError):
        legs.complete(StepResult(plan.step + 1, (), 0.0), 0.0)


def test_leg_without_its_token_is_dropped_as_our_fault() -> None:
    pool = BlockPool(8, 4)
    legs = scheduler(pool)
    legs.add(leg("a", 6), 0.0)
    plan = legs.schedule(0.0)
    assert plan is not None
    (drop,) = legs.complete(StepResult(plan.step, (), 0.0), 0.0).dropped
    assert (drop.leg_id, drop.reason) == ("a", DropReason.INTERNAL)
    assert pool.allocated_blocks == 0


def test_load_counts_the_tokens_that_are_still_to_be_read() -> None:
    legs = scheduler(BlockPool(16, 4))
    legs.add(leg("a", 12), 0.0)
    legs.add(leg("b", 5), 0.0)
    finish(legs, legs.schedule(0.0))
    load = legs.load()
    assert (load.waiting_prefill_tokens, load.waiting_legs, load.running_sequences) == (9, 1, 1)
    assert (load.total_blocks, load.free_blocks) == (16, 13)
    assert load.allocated_blocks == load.referenced_blocks == 3
