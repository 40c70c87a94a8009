"""Whatever workers do, each index is emitted once, in order; the request ends once, no leg forgotten."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.leg import DropReason
from router.commands import Cancel, Command, PlaceDecode, PlacePrefetch, PlacePrefill, SendDecode
from router.leg import ENDED, Leg, State
from router.worker_key import WorkerKey
from tandem.errors import ProtocolError
from tandem.ids import LegId
from tandem.sampling import FinishReason, SamplingParams
from tests.router.sessions import PROMPT, make_session, worker

SAMPLES = 3
MAX_TOKENS = 5
PREFILLS = (worker("p1"), worker("p2"))
DECODES = (worker("d1"), worker("d2"))
WORKERS = (*PREFILLS, *DECODES)
RETRIED = tuple(reason for reason in DropReason if reason not in (DropReason.DEADLINE, DropReason.TOO_LARGE))


def token(sample: int, index: int) -> int:
    """What an undisturbed run writes."""
    return (sample * 7 + index * 3) % 26


class SessionMachine(RuleBasedStateMachine):
    """One request against workers that write right tokens at random, wrong and old indices, and fail."""

    def __init__(self) -> None:
        super().__init__()
        params = SamplingParams(n=SAMPLES, max_tokens=MAX_TOKENS)
        self.session = make_session(params, max_replacements=1_000)
        self.to_prefill: set[LegId] = set()
        self.to_prefetch: set[LegId] = set()
        self.to_decode: set[LegId] = set()
        self.old: list[LegId] = []
        self.at_worker: set[tuple[WorkerKey, LegId]] = set()
        self.emitted: list[list[int]] = [[] for _ in range(SAMPLES)]
        self.finishes = [0] * SAMPLES
        self.finals = 0
        self.now_s = 0.0
        self.carry_out(self.session.admit(self.now_s))

    def carry_out(self, commands: list[Command] | tuple[Command, ...]) -> None:
        for command in commands:
            if isinstance(command, PlacePrefill):
                self.to_prefill.add(command.leg_id)
            elif isinstance(command, PlaceDecode):
                self.to_decode.add(command.leg_id)
            elif isinstance(command, PlacePrefetch):
                self.to_prefetch.add(command.leg_id)
            elif isinstance(command, SendDecode):
                assert (command.worker, command.leg_id) in self.at_worker
                self.session.decode_sent(command.leg_id, command.worker)
            elif isinstance(command, Cancel) and not command.samples:
                self.at_worker.discard((command.worker, command.leg_id))
        self.to_prefill &= self.session.legs.keys()
        self.to_prefetch &= {leg.leg_id for leg in self.legs_in(State.PREFILLING)}
        self.to_decode &= self.session.legs.keys()

    def tell(self, leg: Leg, who: WorkerKey, sample: int, first: int, count: int) -> None:
        finish = FinishReason.LENGTH if first + count == MAX_TOKENS else None
        tokens = [token(sample, first + i) for i in range(count)]
        try:
            commands = self.session.tokens(
                who, leg.leg_id, sample, first, tokens, (), finish, None, self.now_s
            )
        except ProtocolError:
            commands = self.session.violated(leg.leg_id, self.now_s)
        self.note_ended(leg)
        self.carry_out(list(commands))

    def note_ended(self, leg: Leg) -> None:
        if leg.leg_id not in self.session.legs:
            self.old.append(leg.leg_id)
            self.at_worker -= {pair for pair in self.at_worker if pair[1] == leg.leg_id and not leg.samples}

    def legs_in(self, *states: State) -> list[Leg]:
        return [leg for leg in self.session.legs.values() if leg.state in states]

    @precondition(lambda self: self.to_prefill)
    @rule(data=st.data())
    def place_prefill(self, data: st.DataObject) -> None:
        leg_id = data.draw(st.sampled_from(sorted(self.to_prefill)))
        who = data.draw(st.sampled_from(PREFILLS))
        self.to_prefill.discard(leg_id)
        self.session.prefill_sent(leg_id, who, self.now_s)
        self.at_worker.add((who, leg_id))

    @precondition(lambda self: self.legs_in(State.PREFILLING))
    @rule(data=st.data())
    def prefill_writes_its_token(self, data: st.DataObject) -> None:
        leg = data.draw(st.sampled_from(self.legs_in(State.PREFILLING)))
        assert leg.prefill is not None
        for sample in list(leg.samples):
            self.tell(leg, leg.prefill, sample, len(leg.token_ids) - len(PROMPT), 1)

    @precondition(lambda self: self.legs_in(State.PREFILLING))
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        leg = data.draw(st.sampled_from(self.legs_in(State.PREFILLING)))
        assert leg.prefill is not None
        if leg.decode is None:
            self.carry_out(list(self.session.kv_growing(leg.prefill, leg.leg_id, 1)))

    @precondition(lambda self: self.to_prefetch)
    @rule(data=st.data())
    def place_prefetch(self, data: st.DataObject) -> None:
        leg_id = data.draw(st.sampled_from(sorted(self.to_prefetch)))
        who = data.draw(st.sampled_from(DECODES))
        self.to_prefetch.discard(leg_id)
        self.session.prefetch_sent(leg_id, who)
        self.at_worker.add((who, leg_id))

    @precondition(lambda self: self.session.legs)
    @rule(data=st.data(), who=st.sampled_from(DECODES))
    def lose_prefetch(self, data: st.DataObject, who: WorkerKey) -> None:
        leg = data.draw(st.sampled_from(list(self.session.legs.values())))
        fetching = leg.state is State.PREFILLING and leg.decode == who
        assert self.session.prefetch_lost(who, leg.leg_id) is fetching
        if fetching:
            self.at_worker.discard((who, leg.leg_id))

    @precondition(lambda self: self.legs_in(State.PREFILLING))
    @rule(data=st.data(), epoch=st.sampled_from([1, 1, 2]))
    def offer(self, data: st.DataObject, epoch: int) -> None:
        leg = data.draw(st.sampled_from(self.legs_in(State.PREFILLING)))
        assert leg.prefill is not None
        try:
            commands = self.session.kv_offered(leg.prefill, leg.leg_id, epoch, 0)
        except ProtocolError:
            commands = self.session.violated(leg.leg_id, self.now_s)
            self.note_ended(leg)
        self.carry_out(list(commands))

    @precondition(lambda self: self.to_decode)
    @rule(data=st.data())
    def place_decode(self, data: st.DataObject) -> None:
        leg_id = data.draw(st.sampled_from(sorted(self.to_decode)))
        who = data.draw(st.sampled_from(DECODES))
        self.to_decode.discard(leg_id)
        self.session.decode_sent(leg_id, who)
        self.at_worker.add((who, leg_id))

    @precondition(lambda self: self.legs_in(State.HANDOFF))
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        leg = data.draw(st.sampled_from(self.legs_in(State.HANDOFF)))
        if leg.decode is not None:
            assert self.session.kv_landed(leg.decode, leg.leg_id, "shm", 1, self.now_s)
            assert leg.prefill is not None
            self.at_worker.discard((leg.prefill, leg.leg_id))

    @precondition(lambda self: self.legs_in(State.DECODING))
    @rule(data=st.data(), shift=st.sampled_from([0, 0, 0, 0, -1, -2, 1, 2]), count=st.integers(1, 3))
    def decode_writes(self, data: st.DataObject, shift: int, count: int) -> None:
        leg = data.draw(st.sampled_from(self.legs_in(State.DECODING)))
        sample = data.draw(st.sampled_from(leg.samples))
        assert leg.decode is not None
        first = max(0, len(self.session.samples[sample].tokens) + shift)
        if first < MAX_TOKENS:
            self.tell(leg, leg.decode, sample, first, min(count, MAX_TOKENS - first))

    @rule(who=st.sampled_from(WORKERS), sample=st.integers(0, 9), first=st.integers(0, 6), data=st.data())
    def old_or_strange_news(self, who: WorkerKey, sample: int, first: int, data: st.DataObject) -> None:
        known = [*sorted(set(self.old)), LegId("never-made")]
        leg_id = data.draw(st.sampled_from(known))
        assert not self.session.tokens(who, leg_id, sample, first, [1, 2], (), None, None, self.now_s)
        assert not self.session.kv_offered(who, leg_id, 1, 0)
        assert not self.session.kv_growing(who, leg_id, 1)
        assert not self.session.prefetch_lost(who, leg_id)
        assert not self.session.kv_landed(who, leg_id, "shm", 0, self.now_s)
        assert not self.session.dropped(who, leg_id, (), DropReason.INTERNAL, "", self.now_s)

    @precondition(lambda self: self.session.legs)
    @rule(data=st.data(), reason=st.sampled_from(RETRIED), some=st.booleans())
    def drop(self, data: st.DataObject, reason: DropReason, some: bool) -> None:
        leg = data.draw(st.sampled_from(list(self.session.legs.values())))
        who = data.draw(st.sampled_from(WORKERS))
        named = (leg.samples[0],) if some else ()
        self.carry_out(list(self.session.dropped(who, leg.leg_id, named, reason, "", self.now_s)))
        self.note_ended(leg)
        if leg.leg_id not in self.session.legs:
            self.at_worker.discard((who, leg.leg_id))

    @rule(who=st.sampled_from(WORKERS))
    def lose_worker(self, who: WorkerKey) -> None:
        before = list(self.session.legs.values())
        self.carry_out(self.session.worker_lost(who, self.now_s))
        self.at_worker = {pair for pair in self.at_worker if pair[0] != who}
        for leg in before:
            self.note_ended(leg)

    @rule(passed_s=st.floats(0.0, 1.0))
    def time_passes(self, passed_s: float) -> None:
        self.now_s += passed_s

    @rule()
    def read(self) -> None:
        update = self.session.take_update(self.now_s)
        if update is None:
            return
        for chunk in update.chunks:
            assert chunk.first_index == len(self.emitted[chunk.sample_index])
            self.emitted[chunk.sample_index] += chunk.token_ids
            self.finishes[chunk.sample_index] += chunk.finish is not None
            assert len(chunk.text) == len(chunk.token_ids)
        self.finals += update.usage is not None

    @precondition(lambda self: not self.session.ended)
    @rule(chance=st.integers(0, 30))
    def cancel(self, chance: int) -> None:
        if chance == 0:
            self.carry_out(self.session.cancel())
            assert self.session.state is State.CANCELLED

    @invariant()
    def every_emitted_token_is_the_undisturbed_one(self) -> None:
        for sample, tokens in enumerate(self.emitted):
            assert tokens == [token(sample, i) for i in range(len(tokens))]

    @invariant()
    def every_unfinished_sample_is_in_exactly_one_leg(self) -> None:
        written = sorted(i for leg in self.session.legs.values() for i in leg.samples)
        unfinished = [s.index for s in self.session.samples if s.finish is None]
        assert written == ([] if self.session.state in (State.CANCELLED, State.FAILED) else unfinished)
        assert self.session.ended == (not self.session.legs)

    @invariant()
    def a_worker_that_fetches_early_is_known_to_the_leg(self) -> None:
        for leg in self.legs_in(State.PREFILLING):
            fetching = {who for who, leg_id in self.at_worker if leg_id == leg.leg_id} - {leg.prefill}
            assert fetching == ({leg.decode} if leg.decode is not None else set())

    @invariant()
    def every_waiting_leg_is_somewhere_to_be_placed(self) -> None:
        waiting = {leg.leg_id for leg in self.legs_in(State.ADMITTED)}
        assert waiting == self.to_prefill
        assert {leg.leg_id for leg in self.legs_in(State.HANDOFF) if leg.decode is None} == self.to_decode

    @invariant()
    def no_worker_keeps_a_leg_that_is_over(self) -> None:
        for _, leg_id in self.at_worker:
            assert leg_id in self.session.legs

    def teardown(self) -> None:
        """Driven on without faults, the request ends with all its tokens, once."""
        for _ in range(100):
            if self.session.ended:
                break
            self.drive()
        self.read()
        self.read()
        assert self.session.state in ENDED
        if self.session.state is State.FINISHED:
            assert [len(tokens) for tokens in self.emitted] == [MAX_TOKENS] * SAMPLES
            assert self.finishes == [1] * SAMPLES
            assert self.finals == 1

    def drive(self) -> None:
        for leg_id in sorted(self.to_prefill):
            self.to_prefill.discard(leg_id)
            self.session.prefill_sent(leg_id, PREFILLS[0], self.now_s)
        for leg in self.legs_in(State.PREFILLING):
            assert leg.prefill is not None
            for sample in list(leg.samples):
                self.tell(leg, leg.prefill, sample, len(leg.token_ids) - len(PROMPT), 1)
            self.carry_out(list(self.session.kv_offered(leg.prefill, leg.leg_id, 1, 0)))
        for leg in self.legs_in(State.HANDOFF):
            if leg.decode is None:
                self.to_decode.discard(leg.leg_id)
                self.session.decode_sent(leg.leg_id, DECODES[0])
            assert leg.decode is not None
            self.session.kv_landed(leg.decode, leg.leg_id, "shm", 1, self.now_s)
        for leg in self.legs_in(State.DECODING):
            for sample in list(leg.samples):
                first = len(self.session.samples[sample].tokens)
                assert leg.decode is not None
                self.tell(leg, leg.decode, sample, first, 1)


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
