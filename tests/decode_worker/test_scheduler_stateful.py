"""The decode scheduler under random use on tiny pools, driven over KV that shows every misuse of a block.

Preempted samples come back as legs of their own, as the router sends them: no token is lost or repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode_worker.scheduler import (
    DecodeLeg,
    DecodeOutcome,
    DecodeScheduler,
    LegState,
    Reservation,
    SampleStart,
)
from decode_worker.speculation import Speculation
from engine.kv.blocks import BlockPool
from engine.leg import DroppedLeg, DropReason
from engine.step import StepPlan
from tandem.errors import Overloaded, PromptTooLong
from tandem.ids import LegId
from tandem.sampling import FinishReason, SamplingParams
from tests.engine.toy_runner import ToyRunner, touched_blocks, toy_output, written_blocks

BLOCKS, SIZE, CONTEXT, VOCABULARY, EOS, BATCH = 7, 2, 16, 5, 0, 4


@dataclass
class Client:
    """One sample as its reader sees it; `output` grows by one token at a time."""

    prompt: tuple[int, ...]
    sample_index: int
    params: SamplingParams
    output: list[int] = field(default_factory=list)
    finish: FinishReason | None = None


class DecodeMachine(RuleBasedStateMachine):
    """`readers` maps (leg, sample) to who reads it; removed when it finished, was cancelled or given up.

    `early` are legs whose fetch began before their first tokens are known; they start later, come what may.
    """

    sampling: ClassVar[dict[str, Any]] = {"ignore_eos": True, "presence_penalty": 0.1}

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.legs = self.scheduler()
        self.runner = ToyRunner(BLOCKS, SIZE, VOCABULARY)
        self.now_s = 0.0
        self.number = 0
        self.readers: dict[tuple[LegId, int], Client] = {}
        self.preempted: list[Client] = []
        self.early: dict[LegId, tuple[DecodeLeg, list[Client]]] = {}
        self.pulls: dict[LegId, tuple[Reservation, tuple[int, ...]]] = {}
        self.token_ids: dict[LegId, tuple[int, ...]] = {}
        self.plan: StepPlan | None = None

    def scheduler(self) -> DecodeScheduler:
        """The scheduler under test."""
        return DecodeScheduler(
            self.pool,
            max_batch=BATCH,
            max_waiting=4,
            context_tokens=CONTEXT,
            eos_ids=(EOS,),
            chunk_tokens=3,
            speculation=self.speculation(),
        )

    def speculation(self) -> Speculation | None:
        """What guesses tokens for the scheduler: nobody."""
        return None

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=CONTEXT),
        samples=st.integers(1, 3),
        known=st.sampled_from([1, 1, 5]),
        max_tokens=st.integers(2, 9),
        priority=st.integers(-1, 1),
        patience_s=st.sampled_from([1.0, 1e9, 1e9]),
    )
    def add(
        self,
        prompt: list[int],
        samples: int,
        known: int,
        max_tokens: int,
        priority: int,
        patience_s: float,
    ) -> None:
        params = SamplingParams(max_tokens=max_tokens + known, **self.sampling)
        clients = [
            Client(tuple(prompt), index, params, toy_output(prompt, index, known, VOCABULARY))
            for index in range(samples)
        ]
        starts = tuple(SampleStart(client.sample_index, tuple(client.output)) for client in clients)
        self.send(tuple(prompt), starts, clients, priority, self.now_s + patience_s)

    @precondition(lambda self: self.preempted)
    @rule()
    def come_back(self) -> None:
        """A preempted sample was read again elsewhere, which drew one more token."""
        client = self.preempted.pop(0)
        token_ids = (*client.prompt, *client.output)
        if len(token_ids) + 2 > CONTEXT or len(client.output) + 1 == client.params.max_tokens:
            return
        client.output = toy_output(
            client.prompt, client.sample_index, len(client.output) + 1, VOCABULARY, client.output
        )
        starts = (SampleStart(client.sample_index, (client.output[-1],)),)
        self.send(token_ids, starts, [client], 0, 1e9)

    def send(
        self,
        token_ids: tuple[int, ...],
        starts: tuple[SampleStart, ...],
        clients: list[Client],
        priority: int,
        deadline_s: float,
    ) -> None:
        """Adds a leg, if it is taken."""
        leg = self.leg(token_ids, starts, clients, priority, deadline_s)
        if self.taken(leg, self.legs.add):
            self.readers.update({(leg.leg_id, client.sample_index): client for client in clients})

    def leg(
        self,
        token_ids: tuple[int, ...],
        starts: tuple[SampleStart, ...],
        clients: list[Client],
        priority: int,
        deadline_s: float,
    ) -> DecodeLeg:
        """A leg with an id of its own."""
        self.number += 1
        leg_id = LegId(f"leg {self.number}")
        return DecodeLeg(
            leg_id, token_ids, len(clients[0].prompt), starts, clients[0].params, priority, deadline_s
        )

    def taken(self, leg: DecodeLeg, give: Callable[[DecodeLeg, float], None]) -> bool:
        """Whether the scheduler takes a leg that is given to it."""
        longest = len(leg.token_ids) + max(len(start.token_ids) or 1 for start in leg.samples)
        try:
            give(leg, self.now_s)
        except Overloaded:
            return False
        except PromptTooLong:
            assert longest >= CONTEXT or longest > BLOCKS * SIZE
            return False
        self.token_ids[leg.leg_id] = tuple(leg.token_ids)
        return True

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=CONTEXT - 2),
        samples=st.integers(1, 2),
        priority=st.integers(-1, 1),
        patience_s=st.sampled_from([1.0, 1e9, 1e9]),
    )
    def prefetch(self, prompt: list[int], samples: int, priority: int, patience_s: float) -> None:
        params = SamplingParams(max_tokens=6, **self.sampling)
        clients = [Client(tuple(prompt), index, params) for index in range(samples)]
        starts = tuple(SampleStart(index, ()) for index in range(samples))
        leg = self.leg(tuple(prompt), starts, clients, priority, self.now_s + patience_s)
        if self.taken(leg, self.legs.prefetch):
            self.early[leg.leg_id] = (leg, clients)

    @precondition(lambda self: self.early)
    @rule(data=st.data())
    def start_early(self, data: st.DataObject) -> None:
        self.start(data.draw(st.sampled_from(sorted(self.early))))

    def start(self, leg_id: LegId) -> None:
        """The first tokens are known; a leg whose fetch was lost comes as any other."""
        leg, clients = self.early.pop(leg_id)
        for client in clients:
            client.output = toy_output(client.prompt, client.sample_index, 1, VOCABULARY)
        starts = tuple(SampleStart(client.sample_index, tuple(client.output)) for client in clients)
        leg = replace(leg, samples=starts, deadline_s=1e9)
        if not self.legs.fetched_early(leg_id):
            if not self.taken(leg, self.legs.add):
                return
        else:
            here = self.legs.legs()[leg_id] is LegState.LANDED
            assert self.legs.start(leg) is here
        self.readers.update({(leg_id, client.sample_index): client for client in clients})

    @precondition(lambda self: self.early)
    @rule(data=st.data())
    def cancel_early(self, data: st.DataObject) -> None:
        leg_id = data.draw(st.sampled_from(sorted(self.early)))
        del self.early[leg_id]
        assert self.legs.cancel(leg_id) is (leg_id in self.pulls)

    def take_lost(self) -> None:
        """Early fetches that are lost do not come back by themselves."""
        for lost in self.legs.take_lost():
            assert lost.leg_id in self.early
            assert lost.pulling is (lost.leg_id in self.pulls)
            assert not self.legs.fetched_early(lost.leg_id)

    @rule()
    def reserve(self) -> None:
        for reservation in self.legs.reserve(self.now_s):
            table = self.legs.held_blocks()
            assert all(sum(block in t for t in table) == 1 for block in reservation.target_blocks)
            self.pulls[reservation.leg_id] = (reservation, self.token_ids[reservation.leg_id])
            self.runner.scribble(reservation.target_blocks)

    @precondition(lambda self: self.pulls)
    @rule(data=st.data(), success=st.sampled_from([True, True, False]))
    def end_pull(self, data: st.DataObject, success: bool) -> None:
        leg_id = data.draw(st.sampled_from(sorted(self.pulls)))
        self.answer_pull(leg_id, success)

    def answer_pull(self, leg_id: LegId, success: bool) -> None:
        """The hand-off wrote everything, or anything."""
        reservation, token_ids = self.pulls.pop(leg_id)
        wanted = any(leg == leg_id for leg, _ in self.readers)
        if success:
            self.runner.pull(token_ids, reservation.target_blocks, reservation.first_block)
            assert self.legs.landed(leg_id, self.now_s) is wanted
            return
        self.runner.scribble(reservation.target_blocks)
        self.legs.failed(leg_id)
        for key in [key for key in self.readers if key[0] == leg_id]:
            del self.readers[key]

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), some=st.sets(st.integers(0, 3)))
    def cancel(self, data: st.DataObject, some: set[int]) -> None:
        leg_id = data.draw(st.sampled_from(sorted({leg for leg, _ in self.readers})))
        unwanted = self.legs.cancel(leg_id, tuple(some))
        for index in some or {0, 1, 2}:
            self.readers.pop((leg_id, index), None)
        still = any(leg == leg_id for leg, _ in self.readers)
        assert unwanted is (leg_id in self.pulls and not still)

    @precondition(lambda self: self.plan is None)
    @rule()
    def begin_step(self) -> None:
        self.plan = self.legs.schedule(self.now_s)
        self.take_lost()
        if self.plan is None:
            return
        assert len(self.plan.slices) <= BATCH
        written = written_blocks(self.plan, SIZE)
        assert len(set(written)) == len(written), "two samples write one block"
        pulled = {block for reservation, _ in self.pulls.values() for block in reservation.target_blocks}
        assert not pulled & touched_blocks(self.plan), "a step touches what a hand-off writes"

    @precondition(lambda self: self.plan is not None)
    @rule()
    def end_step(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        self.now_s += 0.1
        self.take(self.legs.complete(self.runner.run(plan), self.now_s))

    def take(self, outcome: DecodeOutcome) -> None:
        """Each token is the reader's next one, and the one of an undisturbed run."""
        for token in outcome.tokens:
            client = self.readers[token.leg_id, token.sample_index]
            assert token.output_index == len(client.output)
            client.output.append(token.token_id)
            expected = toy_output(client.prompt, client.sample_index, len(client.output), VOCABULARY)
            assert client.output == expected
            if token.finish is not None:
                client.finish = token.finish
                del self.readers[token.leg_id, token.sample_index]
        self.take_drops(outcome.dropped)

    def take_drops(self, drops: tuple[DroppedLeg, ...]) -> None:
        """Preempted readers come back later, the others are gone."""
        for drop in drops:
            for key in [key for key in self.readers if key[0] == drop.leg_id]:
                if drop.sample_indices and key[1] not in drop.sample_indices:
                    continue
                client = self.readers.pop(key)
                if drop.reason is DropReason.PREEMPTED:
                    self.preempted.append(client)
                else:
                    assert drop.reason in (DropReason.DEADLINE, DropReason.TOO_LARGE)

    @rule(seconds=st.sampled_from([0.2, 2.0]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.take_drops(self.legs.expire(self.now_s))
        self.take_lost()
        deadline_s = self.legs.next_deadline_s()
        assert deadline_s is None or deadline_s > self.now_s

    @invariant()
    def accounts_agree(self) -> None:
        self.pool.check_integrity(self.legs.held_blocks())
        load = self.legs.load()
        assert load.allocated_blocks == load.referenced_blocks

    @invariant()
    def blocks_in_flight_stay_taken(self) -> None:
        pulled = [block for reservation, _ in self.pulls.values() for block in reservation.target_blocks]
        in_step = touched_blocks(self.plan) if self.plan is not None else set()
        assert all(self.pool.references(block) > 0 for block in (*pulled, *in_step))

    def teardown(self) -> None:
        for _ in range(400):
            if self.plan is None:
                self.begin_step()
            if self.plan is not None:
                self.end_step()
            self.take_drops(self.legs.expire(self.now_s))
            self.take_lost()
            self.reserve()
            for leg_id in sorted(self.pulls):
                self.answer_pull(leg_id, True)
            if self.early:
                self.start(min(self.early))
            if self.preempted:
                self.come_back()
        assert self.readers == {}
        assert self.preempted == []
        assert self.legs.legs() == {}
        assert self.pool.allocated_blocks == 0


TestDecodeScheduler = DecodeMachine.TestCase
TestDecodeScheduler.settings = settings(
    max_examples=300, stateful_step_count=60, deadline=None, derandomize=True
)
