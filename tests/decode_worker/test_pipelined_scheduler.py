"""A decode scheduler with two steps in flight gives the tokens of one with one, and leaks nothing."""

from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis.stateful import invariant, precondition, rule

from decode_worker.pipelined_scheduler import PipelinedScheduler
from decode_worker.scheduler import DecodeLeg, DecodeScheduler, SampleStart
from engine.kv.blocks import BlockPool
from engine.step import PENDING, StepPlan
from tandem.errors import ProtocolError
from tandem.ids import LegId
from tandem.sampling import FinishReason, SamplingParams
from tests.decode_worker.test_scheduler_stateful import BATCH, CONTEXT, EOS, SIZE, VOCABULARY, DecodeMachine
from tests.engine.toy_runner import ToyRunner, ToyStepInFlight, touched_blocks, toy_output, written_blocks

PROMPT = (1, 2, 1)
FIRST = toy_output(PROMPT, 0, 1, VOCABULARY)[0]


class PipelinedMachine(DecodeMachine):
    """End tokens count, so that samples turn out to have ended while the next step feeds them."""

    sampling: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.following: StepPlan | None = None
        self.begun: list[ToyStepInFlight] = []

    def scheduler(self) -> DecodeScheduler:
        self.pipelined = PipelinedScheduler(
            self.pool, max_batch=BATCH, max_waiting=4, context_tokens=CONTEXT, eos_ids=(EOS,), chunk_tokens=3
        )
        return self.pipelined

    def begin_plan(self) -> None:
        """Hands the plan in flight to the runner, unless it has it."""
        assert self.plan is not None
        if not self.begun:
            self.begun.append(self.runner.begin(self.plan))

    @precondition(lambda self: self.plan is not None and self.following is None)
    @rule()
    def begin_following(self) -> None:
        self.begin_plan()
        self.following = self.pipelined.schedule_following()
        if self.following is not None:
            assert all(part.follows and part.token_ids == (PENDING,) for part in self.following.slices)
            written = written_blocks(self.following, SIZE)
            assert len(set(written)) == len(written), "two samples write one block"
            self.begun.append(self.runner.begin(self.following))

    @precondition(lambda self: self.plan is not None)
    @rule()
    def end_step(self) -> None:
        self.begin_plan()
        self.plan, self.following = self.following, None
        self.now_s += 0.1
        self.take(self.legs.complete(self.begun.pop(0).result(), self.now_s))

    @rule()
    def some_steps(self) -> None:
        """So that runs get as far as several steps of a full pipeline."""
        self.reserve()
        for leg_id in sorted(self.pulls):
            self.answer_pull(leg_id, True)
        for _ in range(4):
            if self.plan is None:
                self.begin_step()
            if self.plan is not None and self.following is None:
                self.begin_following()
            if self.plan is not None:
                self.end_step()

    @invariant()
    def blocks_of_the_following_step_stay_taken(self) -> None:
        touched = touched_blocks(self.following) if self.following is not None else set()
        assert all(self.pool.references(block) > 0 for block in touched)


TestPipelinedScheduler = PipelinedMachine.TestCase
TestPipelinedScheduler.settings = settings(
    max_examples=300, stateful_step_count=60, deadline=None, derandomize=True
)


class Bench:
    """One sample that runs; nothing is in flight."""

    def __init__(self, params: SamplingParams, blocks: int = 8) -> None:
        self.pool = BlockPool(blocks, SIZE)
        self.runner = ToyRunner(blocks, SIZE, VOCABULARY)
        self.legs = PipelinedScheduler(
            self.pool, max_batch=BATCH, max_waiting=4, context_tokens=CONTEXT, eos_ids=(EOS,)
        )
        self.join("leg", params)

    def join(self, name: str, params: SamplingParams) -> None:
        leg = DecodeLeg(LegId(name), PROMPT, len(PROMPT), (SampleStart(0, (FIRST,)),), params, 0, 1e9)
        self.legs.add(leg, 0.0)
        (reservation,) = self.legs.reserve(0.0)
        self.runner.pull(PROMPT, reservation.target_blocks, reservation.first_block)
        assert self.legs.landed(leg.leg_id, 0.0)

    def begin(self, plan: StepPlan | None) -> ToyStepInFlight:
        assert plan is not None
        return self.runner.begin(plan)


def test_the_following_step_draws_the_token_after_the_next() -> None:
    bench = Bench(SamplingParams(max_tokens=6, ignore_eos=True))
    first = bench.begin(bench.legs.schedule(0.0))
    second = bench.begin(bench.legs.schedule_following())
    tokens = [
        *bench.legs.complete(first.result(), 0.0).tokens,
        *bench.legs.complete(second.result(), 0.0).tokens,
    ]
    assert [token.token_id for token in tokens] == toy_output(PROMPT, 0, 3, VOCABULARY)[1:]
    assert [token.output_index for token in tokens] == [1, 2]


def test_nothing_follows_a_last_token() -> None:
    bench = Bench(SamplingParams(max_tokens=2, ignore_eos=True))
    bench.begin(bench.legs.schedule(0.0))
    assert bench.legs.schedule_following() is None


def test_a_sample_that_ended_unforeseen_keeps_its_blocks_until_the_following_step_is_over() -> None:
    second_token = toy_output(PROMPT, 0, 2, VOCABULARY)[1]
    bench = Bench(SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=(second_token,)))
    first = bench.begin(bench.legs.schedule(0.0))
    second = bench.begin(bench.legs.schedule_following())
    (token,) = bench.legs.complete(first.result(), 0.0).tokens
    assert token.finish is FinishReason.STOP
    assert not bench.legs.holds(LegId("leg"))
    assert bench.pool.allocated_blocks > 0
    assert bench.legs.complete(second.result(), 0.0).tokens == ()
    assert bench.pool.allocated_blocks == 0
    assert bench.legs.legs() == {}


def test_a_sample_that_is_cancelled_keeps_its_blocks_until_the_following_step_is_over() -> None:
    bench = Bench(SamplingParams(max_tokens=9, ignore_eos=True))
    first = bench.begin(bench.legs.schedule(0.0))
    second = bench.begin(bench.legs.schedule_following())
    bench.legs.cancel(LegId("leg"))
    assert bench.legs.complete(first.result(), 0.0).tokens == ()
    assert bench.pool.allocated_blocks > 0
    assert bench.legs.complete(second.result(), 0.0).tokens == ()
    assert bench.pool.allocated_blocks == 0


def test_who_joined_meanwhile_is_not_kept_waiting_by_following_steps() -> None:
    bench = Bench(SamplingParams(max_tokens=9, ignore_eos=True))
    first = bench.begin(bench.legs.schedule(0.0))
    bench.join("another", SamplingParams(max_tokens=9, ignore_eos=True))
    assert bench.legs.schedule_following() is None
    bench.legs.complete(first.result(), 0.0)
    plan = bench.legs.schedule(0.0)
    assert plan is not None
    assert len(plan.slices) == 2


def test_a_draw_that_needs_the_tokens_before_it_waits_for_them() -> None:
    bench = Bench(SamplingParams(max_tokens=9, presence_penalty=0.5))
    bench.begin(bench.legs.schedule(0.0))
    assert bench.legs.schedule_following() is None


def test_nothing_follows_where_no_block_is_free() -> None:
    bench = Bench(SamplingParams(max_tokens=9, ignore_eos=True), blocks=2)
    bench.begin(bench.legs.schedule(0.0))
    assert bench.legs.schedule_following() is None


def test_a_following_step_needs_exactly_one_step_in_flight() -> None:
    bench = Bench(SamplingParams(max_tokens=9, ignore_eos=True))
    with pytest.raises(ProtocolError):
        bench.legs.schedule_following()
    bench.legs.schedule(0.0)
    bench.legs.schedule_following()
    with pytest.raises(ProtocolError):
        bench.legs.schedule_following()
