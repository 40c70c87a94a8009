"""Pure: which prompts a prefill worker reads next, in chunks (after Sarathi-Serve), and who holds what.

A leg takes the blocks of all its tokens when it starts, so a started leg never waits for blocks. What it has
read is parked until the decode worker has it; a long leg is offered when it starts, so that its KV can be
pulled while it is read.
"""

from bisect import insort
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from engine.kv.blocks import BlockPool, distinct_blocks
from engine.leg import DroppedLeg, DropReason, LegToken, LoadNumbers
from engine.leg_bounds import check_pool, check_queue
from engine.sampling.ending import banned_tokens, ending_after
from engine.step import SampledToken, SampleRequest, SequenceSlice, StepPlan, StepResult
from engine.transitions import next_state
from prefill_worker.giving import Giving
from prefill_worker.prefill_leg import (
    LEG_TRANSITIONS,
    OFFERED,
    READING,
    STARTED,
    GrownLeg,
    LegInput,
    LegRecord,
    LegState,
    OfferedLeg,
    PrefillBacklog,
    PrefillLeg,
    PrefillOutcome,
)
from prefill_worker.reading_order import ReadingRules
from tandem.errors import InvalidRequest, OutOfBlocks, PromptTooLong, ProtocolError
from tandem.ids import BlockId, LegId

__all__ = ["GrownLeg", "LegState", "OfferedLeg", "PrefillLeg", "PrefillOutcome", "PrefillScheduler"]


class PrefillScheduler:
    """Owns the legs of one prefill worker. At most one plan is in flight: schedule and complete alternate.

    Between them every other method may be called; blocks that the plan touches are freed at complete only.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        token_budget: int,
        max_waiting: int,
        context_tokens: int,
        eos_ids: Collection[int],
        max_parked_fraction: float = 0.9,
        max_passed_by: int = 8,
        whole_prompts: bool = False,
        overlap_min_tokens: int | None = None,
    ) -> None:
        """Limits: `max_waiting` legs in the queue, and those of ReadingRules; parked legs may hold
        `max_parked_fraction` of the pool.

        Legs of at least `overlap_min_tokens` tokens are offered when they start; None: no leg is.
        """
        self._pool = pool
        self._rules = ReadingRules.of_pool(
            pool.num_blocks, token_budget, whole_prompts, max_parked_fraction, max_passed_by
        )
        self._max_waiting = max_waiting
        self._context_tokens = context_tokens
        self._eos_ids = frozenset(eos_ids)
        self._overlap_min_tokens = overlap_min_tokens
        self._legs: dict[LegId, LegRecord] = {}
        self.giving = Giving(pool, self._legs)
        self._waiting: list[LegRecord] = []
        self._running: list[LegRecord] = []
        self._parked_blocks = 0
        self._arrivals = 0
        self._steps = 0
        self._plan: StepPlan | None = None
        self._in_flight: list[LegRecord] = []
        self._opened: list[OfferedLeg] = []

    def add(self, leg: PrefillLeg, now_s: float) -> None:
        """Queues a leg.

        Raises PromptTooLong if it can never fit here, InvalidRequest if it is malformed, Overloaded if the
        queue is full, ProtocolError for a leg id that is here already.
        """
        if leg.leg_id in self._legs:
            raise ProtocolError(f"leg {leg.leg_id} is here already")
        self._check(leg)
        check_queue(len(self._waiting), self._max_waiting)
        self._arrivals += 1
        record = LegRecord(leg, self._arrivals, now_s, leg.sample_indices)
        self._legs[leg.leg_id] = record
        insort(self._waiting, record, key=lambda waiting: waiting.rank)

    def cancel(self, leg_id: LegId, sample_indices: Sequence[int] = ()) -> bool:
        """Stops a leg, or some of its samples; idempotent, an unknown leg is ignored.

        True means that an offer stands that nobody wants: withdraw it, then call release.
        """
        record = self._legs.get(leg_id)
        if record is None:
            return False
        if sample_indices:
            record.live = tuple(index for index in record.live if index not in sample_indices)
            if record.live:
                return False
        if record.state is not LegState.PARKED:
            self._stop(record)
        return record.state in OFFERED

    def release(self, leg_id: LegId, committed: bool = False) -> None:
        """A leg's offer is over, and nobody reads its blocks: they are free once no step touches them.

        `committed` says that they were handed over; a leg that is still being read is offered anew at its end
        otherwise. An unknown leg is ignored.
        """
        record = self._legs.get(leg_id)
        if record is not None:
            self._apply(record, LegInput.COMMIT if committed else LegInput.RELEASE)

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next step, or None if nothing can run now. ProtocolError while a plan is in flight."""
        if self._plan is not None:
            raise ProtocolError(f"step {self._plan.step} is in flight")
        parts = self._rules.fill_step(self._running.copy(), partial(self._start_next, now_s))
        if not parts:
            return None
        self._steps += 1
        self._plan = StepPlan(self._steps, tuple([self._slice(record, tokens) for record, tokens in parts]))
        return self._plan

    def take_opened(self) -> tuple[OfferedLeg, ...]:
        """The growing offers of legs that schedule started since the last call."""
        opened, self._opened = tuple(self._opened), []
        return opened

    def finishing(self) -> tuple[GrownLeg, ...]:
        """Growing legs whose last tokens are in the plan in flight: its layers make them whole one by one."""
        return tuple(
            self._grown(record)
            for record in self._in_flight
            if record.state is LegState.GROWING
            and record.computed + record.slice_tokens == len(record.leg.token_ids)
        )

    def complete(self, result: StepResult, now_s: float) -> PrefillOutcome:
        """Takes the result of the plan in flight; ProtocolError if it is of another."""
        if self._plan is None or self._plan.step != result.step:
            raise ProtocolError(f"step {result.step} is not in flight")
        drawn = {(token.key, token.sample_index): token for token in result.tokens}
        tokens: list[LegToken] = []
        offered: list[OfferedLeg] = []
        dropped: list[DroppedLeg] = []
        in_flight, self._in_flight, self._plan = self._in_flight, [], None
        for record in in_flight:
            record.computed += record.slice_tokens
            record.slice_tokens = 0
            if self._pool.caches:
                self._pool.publish(record.leg.token_ids[: record.computed], record.table)
            if record.state not in READING or record.computed < len(record.leg.token_ids):
                self._apply(record, LegInput.STEP_DONE)
            elif any((record.number, index) not in drawn for index in record.live):
                self._apply(record, LegInput.STOP)
                dropped.append(DroppedLeg(record.leg.leg_id, DropReason.INTERNAL, "the step drew no token"))
            else:
                tokens += self._first_tokens(record, drawn)
                offered += self._park(record, now_s)
        grown = [self._grown(record) for record in in_flight if record.state is LegState.GROWING]
        return PrefillOutcome(tuple(tokens), tuple(offered), tuple(dropped), tuple(grown))

    def expire(self, now_s: float) -> tuple[DroppedLeg, ...]:
        """Drops the legs, parked ones excepted, whose deadline has come; their offers are to be withdrawn."""
        late = [record for record in self._expirable() if record.leg.deadline_s <= now_s]
        for record in late:
            self._stop(record)
        message = "the deadline passed before the prompt was read"
        return tuple(DroppedLeg(record.leg.leg_id, DropReason.DEADLINE, message) for record in late)

    def next_deadline_s(self) -> float | None:
        """When expire has something to do, or None."""
        return min((record.leg.deadline_s for record in self._expirable()), default=None)

    def load(self) -> LoadNumbers:
        """Counts for dispatch and metrics; O(legs + blocks held)."""
        backlog = self.backlog()
        return LoadNumbers(
            waiting_prefill_tokens=backlog.tokens,
            waiting_legs=backlog.waiting_legs,
            running_sequences=backlog.running_legs,
            parked_legs=sum(record.state is LegState.PARKED for record in self._legs.values()),
            total_blocks=self._pool.num_blocks,
            free_blocks=self._pool.free_blocks,
            allocated_blocks=self._pool.allocated_blocks,
            referenced_blocks=distinct_blocks(self.held_blocks()),
        )

    def backlog(self) -> PrefillBacklog:
        """The prompts that are not read; O(waiting and running legs)."""
        tokens = sum(len(each.leg.token_ids) - each.computed for each in (*self._waiting, *self._running))
        return PrefillBacklog(tokens, len(self._waiting), len(self._running))

    def legs(self) -> Mapping[LegId, LegState]:
        """The legs here and their states."""
        return {leg_id: record.state for leg_id, record in self._legs.items()}

    def holds(self, leg_id: LegId) -> bool:
        """Whether a leg is here and somebody still wants it: it waits, is being read or is parked."""
        record = self._legs.get(leg_id)
        return record is not None and (
            record.state in READING or record.state in (LegState.WAITING, LegState.PARKED)
        )

    def held_blocks(self) -> list[tuple[BlockId, ...]]:
        """The block table of each leg: this owner's side of the account of references."""
        return [record.table for record in self._legs.values() if record.table]

    def _check(self, leg: PrefillLeg) -> None:
        tokens = len(leg.token_ids)
        if not 0 < leg.prompt_tokens <= tokens:
            raise InvalidRequest(f"{leg.prompt_tokens} prompt tokens among {tokens}", "prompt_tokens")
        if not leg.sample_indices:
            raise InvalidRequest("no sample is asked for", "sample_indices")
        if tokens >= self._context_tokens:
            raise PromptTooLong(f"{tokens} tokens leave no room in a context of {self._context_tokens}")
        check_pool(tokens, self._pool.num_blocks * self._pool.block_size)

    def _expirable(self) -> list[LegRecord]:
        return [*self._waiting, *(record for record in self._running if record.state in READING)]

    def _start_next(self, now_s: float, room: int | None) -> LegRecord | None:
        """Starts the leg whose turn it is; see ReadingRules.next_to_start."""
        record = self._rules.next_to_start(self._waiting, self._parked_blocks, room, self._take_blocks)
        if record is not None:
            self._start(record, now_s)
        return record

    def _start(self, record: LegRecord, now_s: float) -> None:
        """Begins to read a leg, and offers it if that pays."""
        record.state = next_state(LEG_TRANSITIONS, record.state, LegInput.START)
        record.started_s = now_s
        self._waiting.remove(record)
        self._running.append(record)
        if self._overlaps(record.leg, record.output_index):
            record.state = next_state(LEG_TRANSITIONS, record.state, LegInput.OFFER)
            record.epoch += 1
            self._opened.append(self._offer(record, now_s, stands=False))

    def _overlaps(self, leg: PrefillLeg, output_index: int) -> bool:
        """Whether a leg is worth offering early: long, and not sure to end with its first token."""
        ends_at_once = leg.params.max_tokens is not None and output_index + 1 >= leg.params.max_tokens
        return (
            self._overlap_min_tokens is not None
            and len(leg.token_ids) >= self._overlap_min_tokens
            and not ends_at_once
        )

    def _take_blocks(self, record: LegRecord) -> bool:
        token_ids = record.leg.token_ids
        cached = self._pool.match(token_ids)
        try:
            fresh = self._pool.allocate(self._pool.blocks_for(len(token_ids)) - len(cached))
        except OutOfBlocks:
            self._pool.release(cached)
            return False
        record.table = (*cached, *fresh)
        record.fresh_blocks = len(fresh)
        record.computed = record.cached_tokens = len(cached) * self._pool.block_size
        return True

    def _slice(self, record: LegRecord, tokens: int) -> SequenceSlice:
        """Puts the leg's next `tokens` tokens into the plan that is being made."""
        token_ids = record.leg.token_ids
        end = record.computed + tokens
        record.slice_tokens = tokens
        self._in_flight.append(record)
        samples = self._requests(record) if end == len(token_ids) else ()
        return SequenceSlice(token_ids[record.computed : end], record.computed, record.table, samples)

    def _requests(self, record: LegRecord) -> tuple[SampleRequest, ...]:
        leg = record.leg
        history = leg.token_ids if leg.params.needs_history else ()
        banned = banned_tokens(leg.params, record.output_index, self._eos_ids)
        return tuple(
            SampleRequest(
                record.number, index, record.output_index, leg.params, history, leg.prompt_tokens, banned
            )
            for index in record.live
        )

    def _first_tokens(
        self, record: LegRecord, drawn: Mapping[tuple[int, int], SampledToken]
    ) -> list[LegToken]:
        """The drawn tokens of a leg whose prompt is read; samples that end with theirs are live no more."""
        leg = record.leg
        tokens: list[LegToken] = []
        for index in record.live:
            token = drawn[record.number, index]
            ending = ending_after(
                leg.params,
                token.token_id,
                record.output_index,
                total_tokens=len(leg.token_ids) + 1,
                context_tokens=self._context_tokens,
                eos_ids=self._eos_ids,
            )
            tokens.append(
                LegToken(
                    leg_id=leg.leg_id,
                    sample_index=index,
                    output_index=record.output_index,
                    token_id=token.token_id,
                    logprob=token.logprob,
                    finish=ending.reason if ending is not None else None,
                    stop_token_id=ending.stop_token_id if ending is not None else None,
                )
            )
        record.live = tuple(token.sample_index for token in tokens if token.finish is None)
        return tokens

    def _park(self, record: LegRecord, now_s: float) -> list[OfferedLeg]:
        """Parks and offers the leg if a sample goes on, else its blocks are needed no more."""
        if not record.live:
            self._apply(record, LegInput.FINISH)
            return []
        stands = record.state is not LegState.RUNNING
        record.epoch += not stands
        offer = self._offer(record, now_s, stands)
        self._apply(record, LegInput.PARK)
        return [offer]

    def _offer(self, record: LegRecord, now_s: float, stands: bool) -> OfferedLeg:
        return OfferedLeg(
            leg_id=record.leg.leg_id,
            blocks=record.table,
            ready_blocks=record.ready_blocks(self._pool.block_size),
            epoch=record.epoch,
            stands=stands,
            kv_tokens=len(record.leg.token_ids),
            cached_tokens=record.cached_tokens,
            queue_s=record.started_s - record.arrived_s,
            compute_s=now_s - record.started_s,
        )

    def _grown(self, record: LegRecord) -> GrownLeg:
        return GrownLeg(record.leg.leg_id, record.epoch, record.ready_blocks(self._pool.block_size))

    def _stop(self, record: LegRecord) -> None:
        """Ends a leg that is not parked: at once, or when neither step nor pull touches its blocks."""
        if record.state is LegState.WAITING or record.state in READING:
            self._apply(record, LegInput.STOP_IN_FLIGHT if record.slice_tokens else LegInput.STOP)

    def _apply(self, record: LegRecord, happened: LegInput) -> None:
        """Takes a step of the table; a leg that leaves a list or ends is booked out here."""
        before = record.state
        record.state = next_state(LEG_TRANSITIONS, before, happened)
        if before is LegState.WAITING:
            self._waiting.remove(record)
        elif before in STARTED and record.state not in STARTED:
            self._running.remove(record)
        if record.state is LegState.PARKED:
            self._parked_blocks += record.fresh_blocks
        elif before is LegState.PARKED:
            self._parked_blocks -= record.fresh_blocks
        if record.state is LegState.ENDED:
            self._pool.release(record.table)
            del self._legs[record.leg.leg_id]
