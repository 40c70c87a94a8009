"""The prefill scheduler under random use on tiny pools, driven over KV that shows every misuse of a block."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.blocks import BlockPool
from engine.leg import DropReason
from engine.step import StepPlan
from prefill_worker.scheduler import LegState, PrefillLeg, PrefillOutcome, PrefillScheduler
from tandem.errors import Overloaded, PromptTooLong
from tandem.ids import BlockId, LegId
from tandem.sampling import SamplingParams
from tests.engine.toy_runner import ToyRunner, touched_blocks, toy_token, written_blocks

BLOCKS, SIZE, CONTEXT, VOCABULARY, EOS = 6, 2, 14, 5, 0


class PrefillMachine(RuleBasedStateMachine):
    """`expected` holds the samples that must still get their token, `gone` the legs that may not speak."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.legs = PrefillScheduler(
            self.pool,
            token_budget=5,
            max_waiting=4,
            context_tokens=CONTEXT,
            eos_ids=(EOS,),
            max_passed_by=2,
        )
        self.runner = ToyRunner(BLOCKS, SIZE, VOCABULARY)
        self.now_s = 0.0
        self.added: dict[LegId, PrefillLeg] = {}
        self.expected: dict[LegId, set[int]] = {}
        self.parked: dict[LegId, tuple[BlockId, ...]] = {}
        self.plan: StepPlan | None = None

    @rule(
        tokens=st.lists(st.integers(1, 2), min_size=1, max_size=CONTEXT + 1),
        samples=st.integers(1, 3),
        max_tokens=st.sampled_from([None, None, 1]),
        priority=st.integers(-1, 1),
        patience_s=st.sampled_from([1.0, 1e9]),
    )
    def add(
        self, tokens: list[int], samples: int, max_tokens: int | None, priority: int, patience_s: float
    ) -> None:
        leg = PrefillLeg(
            leg_id=LegId(f"leg {len(self.added)}"),
            token_ids=tuple(tokens),
            prompt_tokens=len(tokens),
            sample_indices=tuple(range(samples)),
            params=SamplingParams(max_tokens=max_tokens, repetition_penalty=1.1),
            priority=priority,
            deadline_s=self.now_s + patience_s,
        )
        self.added[leg.leg_id] = leg
        try:
            self.legs.add(leg, self.now_s)
        except Overloaded:
            assert self.legs.load().waiting_legs == 4
        except PromptTooLong:
            assert len(tokens) >= CONTEXT or len(tokens) > BLOCKS * SIZE
        else:
            self.expected[leg.leg_id] = set(leg.sample_indices)

    @precondition(lambda self: self.added)
    @rule(data=st.data(), some=st.sets(st.integers(0, 3)))
    def cancel(self, data: st.DataObject, some: set[int]) -> None:
        leg_id = data.draw(st.sampled_from(sorted(self.added)))
        unwanted = self.legs.cancel(leg_id, tuple(some))
        assert not unwanted or leg_id in self.parked
        left = self.expected.get(leg_id, set()) - (some or {0, 1, 2})
        if left:
            self.expected[leg_id] = left
        else:
            self.expected.pop(leg_id, None)
        if unwanted:
            self.release(leg_id)

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def hand_over(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(sorted(self.parked))))

    def release(self, leg_id: LegId) -> None:
        """A parked leg goes; its KV must be whole until then."""
        self.runner.check(self.added[leg_id].token_ids, self.table(leg_id))
        del self.parked[leg_id]
        self.legs.release(leg_id)

    def table(self, leg_id: LegId) -> tuple[BlockId, ...]:
        """The blocks that were offered."""
        return self.parked[leg_id]

    @precondition(lambda self: self.plan is None)
    @rule()
    def begin_step(self) -> None:
        self.plan = self.legs.schedule(self.now_s)
        if self.plan is not None:
            assert sum(len(part.token_ids) for part in self.plan.slices) <= 5
            written = written_blocks(self.plan, SIZE)
            assert len(set(written)) == len(written), "two sequences write one block"

    @precondition(lambda self: self.plan is not None)
    @rule()
    def end_step(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        self.now_s += 0.1
        self.take(self.legs.complete(self.runner.run(plan), self.now_s))

    def take(self, outcome: PrefillOutcome) -> None:
        """Every token is one that is still expected, and the one that the KV of exactly its prompt gives."""
        assert outcome.dropped == ()
        for token in outcome.tokens:
            self.expected[token.leg_id].remove(token.sample_index)
            prompt = self.added[token.leg_id].token_ids
            assert token.output_index == 0
            assert token.token_id == toy_token(prompt, token.sample_index, 0, VOCABULARY)
        going_on = {token.leg_id for token in outcome.tokens if token.finish is None}
        assert {offer.leg_id for offer in outcome.offered} == going_on
        for offer in outcome.offered:
            assert self.expected.pop(offer.leg_id) == set()
            self.parked[offer.leg_id] = offer.blocks
            self.runner.check(self.added[offer.leg_id].token_ids, offer.blocks)
        for leg_id in {token.leg_id for token in outcome.tokens} - going_on:
            assert self.expected.pop(leg_id) == set()

    @rule(seconds=st.sampled_from([0.2, 2.0]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        for drop in self.legs.expire(self.now_s):
            assert drop.reason is DropReason.DEADLINE
            del self.expected[drop.leg_id]
        deadline_s = self.legs.next_deadline_s()
        assert deadline_s is None or deadline_s > self.now_s

    @invariant()
    def accounts_agree(self) -> None:
        self.pool.check_integrity(self.legs.held_blocks())
        load = self.legs.load()
        assert load.allocated_blocks == load.referenced_blocks

    @invariant()
    def blocks_in_flight_stay_taken(self) -> None:
        if self.plan is not None:
            assert all(self.pool.references(block) > 0 for block in touched_blocks(self.plan))

    @invariant()
    def all_that_is_wanted_is_here(self) -> None:
        assert all(self.legs.holds(leg_id) for leg_id in (*self.expected, *self.parked))
        states = self.legs.legs()
        assert {leg_id for leg_id, state in states.items() if state is LegState.PARKED} == set(self.parked)

    def teardown(self) -> None:
        for _ in range(200):
            if self.plan is None:
                self.begin_step()
            if self.plan is not None:
                self.end_step()
            elif self.parked:
                self.release(next(iter(self.parked)))
        assert self.expected == {}
        assert self.legs.legs() == {}
        assert self.pool.allocated_blocks == 0


TestPrefillScheduler = PrefillMachine.TestCase
TestPrefillScheduler.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)
