"""Pure: which legs a decode worker fetches, which samples run, and who gives way when blocks run out."""

from bisect import insort
from collections.abc import Collection, Mapping, Sequence

from decode_worker.arrivals import Arrivals, LostPrefetch
from decode_worker.decode_leg import (
    LEG_TRANSITIONS,
    SAMPLE_TRANSITIONS,
    DecodeLeg,
    DecodeOutcome,
    LegInput,
    LegRecord,
    LegState,
    Reservation,
    SampleInput,
    SampleRecord,
    SampleStart,
    SampleState,
    check_leg,
)
from decode_worker.grown_tokens import GrownTokens
from decode_worker.room import RoomRules
from decode_worker.sample_blocks import grow, settle, trim
from decode_worker.slices import accepted_tokens, leg_token, sample_slice
from decode_worker.speculation import Speculation
from engine.drafting.draft import NO_DRAFT
from engine.kv.blocks import BlockPool, distinct_blocks
from engine.leg import DroppedLeg, DropReason, LegToken, LoadNumbers
from engine.sampling.ending import ending_after
from engine.step import SampledToken, StepPlan, StepResult
from engine.transitions import next_state
from tandem.errors import OutOfBlocks, ProtocolError
from tandem.ids import BlockId, LegId

__all__ = [
    "DecodeLeg",
    "DecodeOutcome",
    "DecodeScheduler",
    "LegState",
    "LostPrefetch",
    "Reservation",
    "SampleStart",
]


class DecodeScheduler:
    """Owns the legs of one decode worker. At most one plan is in flight: schedule and complete alternate.

    Between them every other method may be called; blocks that the plan touches are freed at complete only,
    and blocks that a pull writes at landed or failed only.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch: int,
        max_waiting: int,
        context_tokens: int,
        eos_ids: Collection[int],
        watermark_blocks: int = 0,
        chunk_tokens: int = 512,
        speculation: Speculation | None = None,
    ) -> None:
        """Limits: `max_batch` samples in the batch or on their way to it, `max_waiting` legs in the queue.

        `watermark_blocks`: see RoomRules. A sample that comes with several tokens is fed at most
        `chunk_tokens` of them a step. `speculation` guesses tokens, which take free blocks only and change
        no output.
        """
        self._pool = pool
        self._max_batch = max_batch
        self._context_tokens = context_tokens
        self._eos_ids = frozenset(eos_ids)
        self._chunk_tokens = chunk_tokens
        self._watermark_blocks = watermark_blocks
        self._arrivals = Arrivals(pool, RoomRules(max_batch, watermark_blocks), max_waiting=max_waiting)
        self._speculation = speculation
        self._legs: dict[LegId, LegRecord] = {}
        self._running: list[SampleRecord] = []
        self._keys = 0
        self._steps = 0
        self._plan: StepPlan | None = None
        self._in_flight: list[SampleRecord] = []
        self._dropped: list[DroppedLeg] = []
        self._dropped_at_s = 0.0

    def add(self, leg: DecodeLeg, now_s: float) -> None:
        """Queues a leg.

        Raises PromptTooLong if it can never fit here, InvalidRequest if it is malformed, Overloaded if the
        queue is full, ProtocolError for a leg id that is here already.
        """
        self._check(leg, started=True)
        self._arrivals.add(leg, now_s, started=True)

    def prefetch(self, leg: DecodeLeg, now_s: float) -> None:
        """Queues a leg whose KV is to be fetched while its prompt is still read; start makes it go on.

        Raises as add does. It gives way to legs that are started and to those that run; see take_lost.
        """
        self._check(leg, started=False)
        self._arrivals.add(leg, now_s, started=False)

    def start(self, leg: DecodeLeg) -> bool:
        """A leg that is fetched early goes on; True if its KV is here, so that it joined the batch.

        Raises as add does, ProtocolError also for a leg that is not fetched early.
        """
        self._check(leg, started=True)
        return self._join(self._arrivals.start(leg))

    def fetched_early(self, leg_id: LegId) -> bool:
        """Whether a leg is here that waits for its start."""
        record = self._arrivals.get(leg_id)
        return record is not None and not record.started and record.wanted

    def take_lost(self) -> tuple[LostPrefetch, ...]:
        """Early fetches that were given up since the last call; the legs may still be started, as others."""
        return self._arrivals.take_lost()

    def reserve(self, now_s: float) -> tuple[Reservation, ...]:
        """Takes blocks for waiting legs, in order and no earlier than there is room for them in the batch.

        Each reservation is to be answered by landed or failed.
        """
        return self._arrivals.reserve(now_s, len(self._running))

    def exchanged(self, leg_id: LegId, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """The pull has changed reserved blocks of a leg, (left, came), for another worker's."""
        self._arrivals.exchanged(leg_id, pairs)

    def landed(self, leg_id: LegId, now_s: float) -> bool:
        """The KV is in the reserved blocks, verified: the leg joins the batch, when it was started.

        False if it did not; nobody may want it any more, and its blocks are free then. An unknown leg is
        ignored.
        """
        return self._join(self._arrivals.landed(leg_id))

    def failed(self, leg_id: LegId) -> None:
        """The pull ended without success and writes nothing any more: frees its blocks. Unknown: ignored."""
        self._arrivals.failed(leg_id)

    def cancel(self, leg_id: LegId, sample_indices: Sequence[int] = ()) -> bool:
        """Stops a leg, or some of its samples; idempotent, an unknown leg is ignored.

        True means that a pull is in flight that nobody wants: cancel it, then call failed.
        """
        arriving = self._arrivals.get(leg_id)
        if arriving is not None:
            return self._arrivals.cancel(arriving, sample_indices)
        record = self._legs.get(leg_id)
        for sample in [] if record is None else list(record.samples):
            if not sample_indices or sample.sample_index in sample_indices:
                self._stop_sample(sample)
        return False

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next step, or None if nothing can run now. ProtocolError while a plan is in flight.

        Samples that had to give way are reported by the next complete or expire, whichever comes first.
        """
        if self._plan is not None:
            raise ProtocolError(f"step {self._plan.step} is in flight")
        self._dropped_at_s = now_s
        self._in_flight = self._make_room()
        if not self._in_flight:
            return None
        self._steps += 1
        asked = 0
        if self._speculation is not None:
            self._speculation.add_drafts(
                self._pool, self._in_flight, self._context_tokens, self._watermark_blocks
            )
            asked = self._speculation.asked_tokens
        copies = tuple(s.pending_copy for s in self._in_flight if s.pending_copy is not None)
        slices = tuple(sample_slice(sample, self._eos_ids, asked) for sample in self._in_flight)
        self._plan = StepPlan(self._steps, slices, copies, self._arrivals.take_landed())
        return self._plan

    def complete(self, result: StepResult, now_s: float) -> DecodeOutcome:
        """Takes the result of the plan in flight; ProtocolError if it is of another."""
        if self._plan is None or self._plan.step != result.step:
            raise ProtocolError(f"step {result.step} is not in flight")
        if self._speculation is not None:
            self._speculation.step_done(self._plan, result)
        drawn: dict[int, list[SampledToken]] = {}
        for token in result.tokens:
            drawn.setdefault(token.key, []).append(token)
        tokens: list[LegToken] = []
        in_flight, self._in_flight, self._plan = self._in_flight, [], None
        guesses = 0 if self._speculation is None else sum(len(sample.draft) for sample in in_flight)
        accepted = 0
        for sample in in_flight:
            settle(self._pool, sample)
            if sample.state is SampleState.LEAVING:
                self._end_sample(sample, SampleInput.STEP_DONE)
            elif sample.computed < len(sample.tokens):
                sample.state = next_state(SAMPLE_TRANSITIONS, sample.state, SampleInput.STEP_DONE)
            elif news := self._take_drawn(sample, drawn.get(sample.key, ())):
                accepted += len(news) - 1
                tokens += news
            else:
                self._drop(sample, DropReason.INTERNAL, "the step drew no token")
        return DecodeOutcome(tuple(tokens), self._take_dropped(), guesses, accepted)

    def expire(self, now_s: float) -> tuple[DroppedLeg, ...]:
        """Drops the legs whose deadline has come, and hands over what schedule dropped.

        A dropped leg whose pull is in flight keeps its blocks until landed or failed. Early fetches are lost
        instead.
        """
        message = "the deadline passed before all tokens were written"
        for record in [r for r in self._records() if r.wanted and r.leg.deadline_s <= now_s]:
            if not record.started:
                self._arrivals.lose(record, message)
                continue
            self._dropped.append(DroppedLeg(record.leg.leg_id, DropReason.DEADLINE, message))
            self.cancel(record.leg.leg_id)
        return self._take_dropped()

    def next_deadline_s(self) -> float | None:
        """When expire has something to do (in the past if it has now), or None."""
        deadlines = [record.leg.deadline_s for record in self._records() if record.wanted]
        if self._dropped:
            deadlines.append(self._dropped_at_s)
        return min(deadlines, default=None)

    def load(self) -> LoadNumbers:
        """Counts for dispatch and metrics; O(legs + blocks held)."""
        return LoadNumbers(
            waiting_prefill_tokens=0,
            waiting_legs=len(self._arrivals),
            running_sequences=len(self._running),
            parked_legs=0,
            total_blocks=self._pool.num_blocks,
            free_blocks=self._pool.free_blocks,
            allocated_blocks=self._pool.allocated_blocks,
            referenced_blocks=distinct_blocks(self.held_blocks()),
        )

    def legs(self) -> Mapping[LegId, LegState]:
        """The legs here and their states."""
        return {record.leg.leg_id: record.state for record in self._records()}

    def leg(self, leg_id: LegId) -> DecodeLeg:
        """A leg that is here; KeyError if it is not."""
        return (self._arrivals.get(leg_id) or self._legs[leg_id]).leg

    def holds(self, leg_id: LegId) -> bool:
        """Whether a leg is here and somebody still wants one of its samples."""
        record = self._arrivals.get(leg_id) or self._legs.get(leg_id)
        return record is not None and record.wanted

    def held_blocks(self) -> list[Sequence[BlockId]]:
        """The block tables of all legs and samples: this owner's side of the account of references."""
        tables = self._arrivals.tables()
        tables += [sample.table for sample in self._running]
        tables += [sample.pending_copy[:1] for sample in self._running if sample.pending_copy is not None]
        return tables

    def _records(self) -> list[LegRecord]:
        return [*self._legs.values(), *self._arrivals]

    def _check(self, leg: DecodeLeg, started: bool) -> None:
        if leg.leg_id in self._legs:
            raise ProtocolError(f"leg {leg.leg_id} is here already")
        check_leg(
            leg,
            started=started,
            max_batch=self._max_batch,
            context_tokens=self._context_tokens,
            pool_tokens=self._pool.num_blocks * self._pool.block_size,
        )

    def _join(self, record: LegRecord | None) -> bool:
        """Makes a leg's samples, which share its blocks, part of the batch; False when there is no leg."""
        if record is None:
            return False
        self._legs[record.leg.leg_id] = record
        for _ in record.starts[1:]:
            self._pool.fork(record.table)
        for start in record.starts:
            self._keys += 1
            tokens, shared = self._tokens_of(record, start), len(record.leg.token_ids)
            sample = SampleRecord(record, start.sample_index, self._keys, tokens, shared, list(record.table))
            record.samples.append(sample)
            insort(self._running, sample, key=lambda running: running.rank)
        record.table = ()
        return True

    def _tokens_of(self, record: LegRecord, start: SampleStart) -> list[int] | GrownTokens:
        return [*record.leg.token_ids, *start.token_ids]

    def _make_room(self) -> list[SampleRecord]:
        """Gives samples the blocks of their next step, at the cost of the last in rank; returns who has them.

        Nothing is in flight here, so blocks can be taken back at once.
        """
        ready = 0
        while ready < len(self._running):
            sample = self._running[ready]
            try:
                self._grow(sample)
                ready += 1
            except OutOfBlocks:
                if self._arrivals.give_way():
                    continue
                if self._arrivals.aborting:
                    break
                if len(self._running) > 1:
                    message = "blocks ran out and this sample was the last in rank"
                    self._drop(self._running[-1], DropReason.PREEMPTED, message)
                elif self._arrivals.pulling:
                    break
                else:
                    message = f"{len(sample.tokens)} tokens do not fit into {self._pool.num_blocks} blocks"
                    self._drop(sample, DropReason.TOO_LARGE, message)
        return self._running[:ready]

    def _grow(self, sample: SampleRecord) -> None:
        """Blocks for the sample's next slice; after OutOfBlocks it can be called again."""
        grow(self._pool, sample, self._chunk_tokens)

    def _take_drawn(self, sample: SampleRecord, drawn: Sequence[SampledToken]) -> list[LegToken]:
        """Appends what the step drew, as far as its guesses held and the sample goes on."""
        draft, sample.draft = sample.draft, NO_DRAFT
        accepted, in_place = accepted_tokens(draft, drawn)
        tokens: list[LegToken] = []
        for place, token in enumerate(accepted):
            sample.computed += 1 <= place <= in_place
            tokens.append(self._append(sample, token))
            if tokens[-1].finish is not None:
                break
        if self._speculation is not None and draft:
            self._speculation.verified(sample, draft, len(accepted) - 1)
        if draft and sample.state is SampleState.RUNNING:
            trim(self._pool, sample)
        return tokens

    def _append(self, sample: SampleRecord, drawn: SampledToken) -> LegToken:
        output_index = sample.output_index
        sample.tokens.append(drawn.token_id)
        ending = ending_after(
            sample.record.leg.params,
            drawn.token_id,
            output_index,
            total_tokens=len(sample.tokens),
            context_tokens=self._context_tokens,
            eos_ids=self._eos_ids,
        )
        if ending is not None:
            self._end_sample(sample, SampleInput.FINISH)
        return leg_token(sample, drawn, output_index, ending)

    def _drop(self, sample: SampleRecord, reason: DropReason, message: str) -> None:
        leg_id = sample.record.leg.leg_id
        self._dropped.append(DroppedLeg(leg_id, reason, message, (sample.sample_index,)))
        self._end_sample(sample, SampleInput.STOP)

    def _stop_sample(self, sample: SampleRecord) -> None:
        if any(sample is flying for flying in self._in_flight):
            sample.state = next_state(SAMPLE_TRANSITIONS, sample.state, SampleInput.STOP_IN_FLIGHT)
        else:
            self._end_sample(sample, SampleInput.STOP)

    def _end_sample(self, sample: SampleRecord, happened: SampleInput) -> None:
        """Takes a sample out of the batch; its full blocks stay cached for who comes with the same prefix."""
        sample.state = next_state(SAMPLE_TRANSITIONS, sample.state, happened)
        self._keep_prefix(sample)
        if sample.pending_copy is not None:
            self._pool.release(sample.pending_copy[:1])
        self._pool.release(sample.table)
        self._running.remove(sample)
        if self._speculation is not None:
            self._speculation.forget(sample)
        record = sample.record
        record.samples.remove(sample)
        if not record.samples:
            record.state = next_state(LEG_TRANSITIONS, record.state, LegInput.LAST_SAMPLE_ENDED)
            del self._legs[record.leg.leg_id]

    def _keep_prefix(self, sample: SampleRecord) -> None:
        if self._pool.caches:
            self._pool.publish(sample.tokens[: sample.computed], sample.table)

    def _take_dropped(self) -> tuple[DroppedLeg, ...]:
        dropped, self._dropped = tuple(self._dropped), []
        return dropped
