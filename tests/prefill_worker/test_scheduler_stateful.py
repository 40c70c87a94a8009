"""The prefill scheduler under random use on tiny pools, driven over KV that shows every misuse of a block."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kv.blocks import BlockPool
from engine.leg import DropReason
from engine.step import StepPlan
from prefill_worker.scheduler import LegState, OfferedLeg, PrefillLeg, PrefillOutcome, PrefillScheduler
from tandem.errors import Overloaded, PromptTooLong
from tandem.ids import LegId
from tandem.sampling import SamplingParams
from tests.engine.toy_runner import ToyRunner, touched_blocks, toy_token, written_blocks

BLOCKS, SIZE, CONTEXT, VOCABULARY, EOS = 6, 2, 14, 5, 0


class PrefillMachine(RuleBasedStateMachine):
    """`expected` holds the samples that must still get their token.

    `offers` are the offers that stand, `parked` the legs of them that are read, `finishing` those whose last
    tokens are in the plan in flight, and `handed` the legs that were handed over before their token came. The
    offers of `unwanted` legs are withdrawn.
    """

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
            overlap_min_tokens=4,
        )
        self.runner = ToyRunner(BLOCKS, SIZE, VOCABULARY)
        self.now_s = 0.0
        self.added: dict[LegId, PrefillLeg] = {}
        self.expected: dict[LegId, set[int]] = {}
        self.offers: dict[LegId, OfferedLeg] = {}
        self.epochs: dict[LegId, int] = {}
        self.parked: set[LegId] = set()
        self.finishing: set[LegId] = set()
        self.handed: set[LegId] = set()
        self.unwanted: set[LegId] = set()
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

    @rule(tokens=st.lists(st.integers(1, 2), min_size=7, max_size=CONTEXT - 1))
    def add_long(self, tokens: list[int]) -> None:
        self.add(tokens, 1, None, 1, 1e9)

    @precondition(lambda self: self.growing())
    @rule(data=st.data())
    def cancel_growing(self, data: st.DataObject) -> None:
        self.stop(data.draw(st.sampled_from(self.growing())), set())

    @precondition(lambda self: self.growing())
    @rule(data=st.data())
    def lose_growing(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.growing())), committed=False)

    @precondition(lambda self: self.finishing)
    @rule()
    def hand_over_in_flight(self) -> None:
        self.end(min(self.finishing), committed=True)

    def growing(self) -> list[LegId]:
        """Offered legs that are being read, or were when they ended."""
        return sorted(self.offers.keys() - self.parked)

    @precondition(lambda self: self.added)
    @rule(data=st.data(), some=st.sets(st.integers(0, 3)))
    def cancel(self, data: st.DataObject, some: set[int]) -> None:
        self.stop(data.draw(st.sampled_from(sorted(self.added))), some)

    def stop(self, leg_id: LegId, some: set[int]) -> None:
        """Cancels samples of a leg, or all of it."""
        unwanted = self.legs.cancel(leg_id, tuple(some))
        assert not unwanted or leg_id in self.offers
        left = self.expected.get(leg_id, set()) - (some or {0, 1, 2})
        if left:
            self.expected[leg_id] = left
        else:
            self.expected.pop(leg_id, None)
            self.handed.discard(leg_id)
        if unwanted:
            self.unwanted.add(leg_id)
            self.parked.discard(leg_id)

    @precondition(lambda self: self.offers)
    @rule(data=st.data(), success=st.booleans())
    def end_offer(self, data: st.DataObject, success: bool) -> None:
        """The source says that nobody reads the blocks any more, for whatever reason."""
        leg_id = data.draw(st.sampled_from(sorted(self.offers)))
        whole = leg_id in self.parked | self.finishing
        self.end(leg_id, committed=success and whole)

    def end(self, leg_id: LegId, committed: bool) -> None:
        """An offer ends; the KV of a parked leg must be whole until then."""
        offer = self.offers.pop(leg_id)
        if leg_id in self.parked:
            self.runner.check(self.added[leg_id].token_ids, offer.blocks)
        elif committed and leg_id in self.expected:
            self.handed.add(leg_id)
        self.parked.discard(leg_id)
        self.finishing.discard(leg_id)
        self.unwanted.discard(leg_id)
        self.legs.release(leg_id, committed)

    def note_offer(self, offer: OfferedLeg) -> None:
        """A new offer has the next epoch; what it says is whole is so."""
        self.epochs[offer.leg_id] = self.epochs.get(offer.leg_id, 0) + 1
        assert offer.epoch == self.epochs[offer.leg_id]
        assert offer.leg_id not in self.offers
        self.offers[offer.leg_id] = offer
        tokens = self.added[offer.leg_id].token_ids
        whole = len(tokens) if not offer.growing else offer.ready_blocks * SIZE
        self.runner.check(tokens[:whole], offer.blocks)

    @precondition(lambda self: self.plan is None)
    @rule()
    def begin_step(self) -> None:
        self.plan = self.legs.schedule(self.now_s)
        for offer in self.legs.take_opened():
            assert len(self.added[offer.leg_id].token_ids) >= 4
            assert self.added[offer.leg_id].params.max_tokens is None
            self.note_offer(offer)
        self.finishing = {grown.leg_id for grown in self.legs.finishing()}
        assert self.finishing <= self.offers.keys() - self.parked
        if self.plan is not None:
            assert sum(len(part.token_ids) for part in self.plan.slices) <= 5
            written = written_blocks(self.plan, SIZE)
            assert len(set(written)) == len(written), "two sequences write one block"

    @precondition(lambda self: self.plan is not None)
    @rule()
    def end_step(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        self.finishing.clear()
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
            assert not offer.growing
            if offer.leg_id in self.handed:
                self.handed.discard(offer.leg_id)
                assert offer.stands
                continue
            if offer.stands:
                assert self.offers[offer.leg_id].epoch == offer.epoch
            else:
                self.note_offer(offer)
            self.parked.add(offer.leg_id)
            self.runner.check(self.added[offer.leg_id].token_ids, offer.blocks)
        for leg_id in {token.leg_id for token in outcome.tokens} - going_on:
            assert self.expected.pop(leg_id) == set()
            self.handed.discard(leg_id)
            self.unwanted |= {leg_id} & self.offers.keys()
        for grown in outcome.grown:
            offer = self.offers[grown.leg_id]
            assert offer.ready_blocks <= grown.ready_blocks < len(offer.blocks)
            assert grown.epoch == offer.epoch
            self.runner.check(self.added[grown.leg_id].token_ids[: grown.ready_blocks * SIZE], offer.blocks)

    @rule(seconds=st.sampled_from([0.2, 2.0]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        for drop in self.legs.expire(self.now_s):
            assert drop.reason is DropReason.DEADLINE
            del self.expected[drop.leg_id]
            self.handed.discard(drop.leg_id)
            self.unwanted |= {drop.leg_id} & self.offers.keys()
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
    def offered_blocks_stay_taken(self) -> None:
        for offer in self.offers.values():
            assert all(self.pool.references(block) > 0 for block in offer.blocks)

    @invariant()
    def all_that_is_wanted_is_here(self) -> None:
        assert all(self.legs.holds(leg_id) for leg_id in (*self.expected, *self.parked))
        states = self.legs.legs()
        parked = {leg_id for leg_id, state in states.items() if state is LegState.PARKED}
        assert parked - self.unwanted == self.parked
        assert not any(self.legs.holds(leg_id) for leg_id in self.unwanted - parked)

    def teardown(self) -> None:
        for _ in range(200):
            if self.plan is None:
                self.begin_step()
            if self.plan is not None:
                self.end_step()
            elif self.offers:
                self.end(min(self.offers), committed=False)
        assert self.expected == {}
        assert self.legs.legs() == {}
        assert self.pool.allocated_blocks == 0


TestPrefillScheduler = PrefillMachine.TestCase
TestPrefillScheduler.settings = settings(
    max_examples=250, stateful_step_count=40, deadline=None, derandomize=True
)
