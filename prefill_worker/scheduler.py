"""Pure: which prompts a prefill worker reads next, in chunks (after Sarathi-Serve), and who holds what.

A leg takes the blocks of all its tokens when it starts, so a started leg never waits for blocks. What it has
read is parked until the decode worker has it.
"""

from bisect import insort
from collections.abc import Collection, Mapping, Sequence

from engine.blocks import BlockPool, distinct_blocks
from engine.ending import banned_tokens, ending_after
from engine.leg import DroppedLeg, DropReason, LegToken, LoadNumbers
from engine.step import SampledToken, SampleRequest, SequenceSlice, StepPlan, StepResult
from engine.transitions import next_state
from prefill_worker.prefill_leg import (
    LEG_TRANSITIONS,
    LegInput,
    LegRecord,
    LegState,
    OfferedLeg,
    PrefillBacklog,
    PrefillLeg,
    PrefillOutcome,
)
from tandem.errors import InvalidRequest, OutOfBlocks, Overloaded, PromptTooLong, ProtocolError
from tandem.ids import BlockId, LegId

__all__ = ["LegState", "OfferedLeg", "PrefillLeg", "PrefillOutcome", "PrefillScheduler"]

_RETRY_AFTER_S = 1.0


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
    ) -> None:
        """Limits: `token_budget` tokens a step, `max_waiting` legs in the queue.

        No leg starts while parked ones hold more than `max_parked_fraction` of the pool. A leg that lacks
        blocks lets at most `max_passed_by` later ones start before it. With `whole_prompts` none is split
        (DistServe's batching): one that is longer than the budget is read alone.
        """
        self._pool = pool
        self._token_budget = token_budget
        self._max_waiting = max_waiting
        self._context_tokens = context_tokens
        self._eos_ids = frozenset(eos_ids)
        self._max_parked_blocks = max_parked_fraction * pool.num_blocks
        self._max_passed_by = max_passed_by
        self._whole_prompts = whole_prompts
        self._legs: dict[LegId, LegRecord] = {}
        self._waiting: list[LegRecord] = []
        self._running: list[LegRecord] = []
        self._parked_blocks = 0
        self._arrivals = 0
        self._steps = 0
        self._plan: StepPlan | None = None
        self._in_flight: list[LegRecord] = []

    def add(self, leg: PrefillLeg, now_s: float) -> None:
        """Queues a leg.

        Raises PromptTooLong if it can never fit here, InvalidRequest if it is malformed, Overloaded if the
        queue is full, ProtocolError for a leg id that is here already.
        """
        if leg.leg_id in self._legs:
            raise ProtocolError(f"leg {leg.leg_id} is here already")
        self._check(leg)
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} legs wait already", _RETRY_AFTER_S)
        self._arrivals += 1
        record = LegRecord(leg, self._arrivals, now_s, leg.sample_indices)
        self._legs[leg.leg_id] = record
        insort(self._waiting, record, key=lambda waiting: waiting.rank)

    def cancel(self, leg_id: LegId, sample_indices: Sequence[int] = ()) -> bool:
        """Stops a leg, or some of its samples; idempotent, an unknown leg is ignored.

        True means that the leg's KV is parked and nobody wants it: withdraw the offer, then call release.
        """
        record = self._legs.get(leg_id)
        if record is None:
            return False
        if sample_indices:
            record.live = tuple(index for index in record.live if index not in sample_indices)
            if record.live:
                return False
        if record.state is LegState.PARKED:
            return True
        self._stop(record)
        return False

    def release(self, leg_id: LegId) -> None:
        """Frees the blocks of a parked leg that was handed over, expired or withdrawn; idempotent."""
        record = self._legs.get(leg_id)
        if record is not None:
            self._end(record, LegInput.RELEASE)
            self._parked_blocks -= record.fresh_blocks

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next step, or None if nothing can run now. ProtocolError while a plan is in flight."""
        if self._plan is not None:
            raise ProtocolError(f"step {self._plan.step} is in flight")
        budget = self._token_budget
        slices: list[SequenceSlice] = []
        for record in self._running:
            if budget == 0:
                break
            slices.append(self._slice(record, budget))
            budget -= record.slice_tokens
        while budget > 0:
            room = budget if slices and self._whole_prompts else None
            started = self._start_next(now_s, room)
            if started is None:
                break
            slices.append(self._slice(started, budget))
            budget -= started.slice_tokens
        if not slices:
            return None
        self._steps += 1
        self._plan = StepPlan(self._steps, tuple(slices))
        return self._plan

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
            if record.state is LegState.LEAVING:
                self._end(record, LegInput.STEP_DONE)
            elif record.computed < len(record.leg.token_ids):
                record.state = next_state(LEG_TRANSITIONS, record.state, LegInput.STEP_DONE)
            elif any((record.number, index) not in drawn for index in record.live):
                self._end(record, LegInput.STOP)
                dropped.append(DroppedLeg(record.leg.leg_id, DropReason.INTERNAL, "the step drew no token"))
            else:
                tokens += self._first_tokens(record, drawn)
                offered += self._park(record, now_s)
        return PrefillOutcome(tuple(tokens), tuple(offered), tuple(dropped))

    def expire(self, now_s: float) -> tuple[DroppedLeg, ...]:
        """Drops the legs, parked ones excepted, whose deadline has come."""
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
        ahead = [*self._waiting, *self._running]
        tokens = sum(len(record.leg.token_ids) - record.computed for record in ahead)
        return PrefillBacklog(tokens, len(self._waiting), len(self._running))

    def legs(self) -> Mapping[LegId, LegState]:
        """The legs here and their states."""
        return {leg_id: record.state for leg_id, record in self._legs.items()}

    def holds(self, leg_id: LegId) -> bool:
        """Whether a leg is here and somebody still wants it: it waits, runs or is parked."""
        record = self._legs.get(leg_id)
        return record is not None and record.state is not LegState.LEAVING

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
        capacity = self._pool.num_blocks * self._pool.block_size
        if tokens > capacity:
            raise PromptTooLong(f"{tokens} tokens are more than the {capacity} that this worker's pool holds")

    def _expirable(self) -> list[LegRecord]:
        running = [record for record in self._running if record.state is LegState.RUNNING]
        return [*self._waiting, *running]

    def _start_next(self, now_s: float, room: int | None) -> LegRecord | None:
        """Starts the first waiting leg whose blocks can be had, unless one ahead was passed by too often.

        None, too, when its turn is a leg of more than `room` tokens.
        """
        if self._parked_blocks > self._max_parked_blocks:
            return None
        blocked: list[LegRecord] = []
        for record in self._waiting:
            if room is not None and len(record.leg.token_ids) > room:
                return None
            if self._take_blocks(record):
                for ahead in blocked:
                    ahead.passed_by += 1
                record.state = next_state(LEG_TRANSITIONS, record.state, LegInput.START)
                record.started_s = now_s
                self._waiting.remove(record)
                self._running.append(record)
                return record
            blocked.append(record)
            if record.passed_by >= self._max_passed_by or len(blocked) > self._max_passed_by:
                return None
        return None

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

    def _slice(self, record: LegRecord, budget: int) -> SequenceSlice:
        """Puts the leg's next chunk, at most `budget` tokens, into the plan that is being made."""
        token_ids = record.leg.token_ids
        end = len(token_ids) if self._whole_prompts else min(record.computed + budget, len(token_ids))
        record.slice_tokens = end - record.computed
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
        """Parks and offers the leg if a sample goes on, else frees it."""
        if not record.live:
            self._end(record, LegInput.FINISH)
            return []
        record.state = next_state(LEG_TRANSITIONS, record.state, LegInput.PARK)
        self._running.remove(record)
        self._parked_blocks += record.fresh_blocks
        offer = OfferedLeg(
            leg_id=record.leg.leg_id,
            blocks=record.table,
            kv_tokens=len(record.leg.token_ids),
            cached_tokens=record.cached_tokens,
            queue_s=record.started_s - record.arrived_s,
            compute_s=now_s - record.started_s,
        )
        return [offer]

    def _stop(self, record: LegRecord) -> None:
        """Ends a leg that is not parked: at once, or at complete if the step in flight touches its blocks."""
        if record.state is LegState.LEAVING:
            return
        if record.slice_tokens > 0:
            record.state = next_state(LEG_TRANSITIONS, record.state, LegInput.STOP_IN_FLIGHT)
        else:
            self._end(record, LegInput.STOP)

    def _end(self, record: LegRecord, happened: LegInput) -> None:
        before = record.state
        record.state = next_state(LEG_TRANSITIONS, before, happened)
        if before is LegState.WAITING:
            self._waiting.remove(record)
        elif before is not LegState.PARKED:
            self._running.remove(record)
        self._pool.release(record.table)
        del self._legs[record.leg.leg_id]
