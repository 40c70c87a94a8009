"""Pure: the steps of a simulated decode worker, one by one or many at once, and when their tokens came."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from decode_worker.decode_leg import DecodeOutcome
from decode_worker.grown_tokens import TOKEN
from decode_worker.run_ahead import RunAheadScheduler
from engine.step import SampledToken, StepPlan, StepResult
from planner.latency import LatencyModel, PromptPart, StepShape, total_tokens
from planner.simulation.events import STEP_BEGIN, STEP_END, EventQueue
from planner.simulation.run_clock import RunClock
from planner.simulation.utilisation import Utilisation
from router.timeline import Pace
from tandem.ids import LegId
from tandem.sampling import FinishReason


@dataclass(slots=True)
class Writing:
    """A leg in the batch: the step that brought its first token not told yet, and when; None before."""

    first_step: int = 0
    first_s: float | None = None


class Tell(Protocol):
    """Tells the router of tokens of a leg."""

    def __call__(
        self, leg_id: LegId, upto: int, finish: FinishReason | None, pace: Pace | None, last_s: float
    ) -> None:
        """Output up to index `upto` (exclusive) is written, the last of it at `last_s`."""
        ...


class DecodeSteps:
    """Owns when the worker's steps begin and end. A run of steps ends early when the batch must change.

    Tokens are told one by one when steps are taken so, else when their sample ends or somebody asks.
    """

    def __init__(
        self,
        scheduler: RunAheadScheduler,
        latency: LatencyModel,
        left_s: Callable[[], float],
        events: EventQueue,
        used: Utilisation,
        stepwise: bool,
        tell: Tell,
        on_outcome: Callable[[DecodeOutcome], None],
        on_scheduled: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._latency = latency
        self._clock = RunClock(latency)
        self._left_s = left_s
        self._events = events
        self._used = used
        self._stepwise = stepwise
        self._tell = tell
        self._on_outcome = on_outcome
        self._on_scheduled = on_scheduled
        self._stopped = False
        self._busy = False
        self._runs = 0
        self._writing: dict[LegId, Writing] = {}
        self._fresh: list[Writing] = []
        self._beginning: list[Writing] = []

    def joined(self, leg_id: LegId) -> None:
        """A leg joined the batch, from the next step on."""
        writing = self._writing[leg_id] = Writing()
        if not self._stepwise:
            self._fresh.append(writing)

    def forget(self, leg_id: LegId) -> None:
        """A leg is over here; idempotent."""
        self._writing.pop(leg_id, None)
        if not self._writing:
            self._clock.forget_gaps()

    def tell(self, leg_id: LegId) -> None:
        """Tells all tokens of a leg that have come by now; unknown legs are ignored."""
        self.sync()
        writing = self._writing.get(leg_id)
        if writing is not None and writing.first_s is not None:
            upto = self._scheduler.drawn(leg_id)[0]
            self._tell(leg_id, upto, None, self._pace(writing), self._clock.last_end_s)
            writing.first_s = None
            self._fresh.append(writing)

    def kick(self) -> None:
        """Begins a step, once all news of this instant is heard, if none is under way."""
        if not self._busy:
            self._busy = True
            self._events.at(self._events.now_s, STEP_BEGIN, self._begin, None)

    def stop(self) -> None:
        """The worker died: the step in flight never ends."""
        for leg_id in self._writing:
            self.tell(leg_id)
        self._stopped = True

    def sync(self) -> None:
        """Brings the scheduler up to now: whole steps of the run in flight that are over are counted."""
        if not self._clock.batch:
            return
        taken, end_s = self._clock.taken_by_now(self._events.now_s)
        if taken == self._clock.taken:
            return
        if end_s == self._events.now_s:
            self._finish(taken)
        else:
            self._note(taken, end_s)
            self._scheduler.advance(taken)

    def shorten(self) -> None:
        """The run in flight ends with the step in flight, because the batch is to change. Call sync first."""
        if self._clock.batch and self._clock.ends_after > self._clock.taken + 1:
            self._end_after(self._clock.taken + 1)

    def shorten_if_short(self) -> None:
        """Shortens the run in flight when blocks that it counted on are gone."""
        if self._clock.batch and self._scheduler.steps_possible() < self._clock.ends_after:
            self.shorten()

    def _begin(self, _: None) -> None:
        if self._stopped:
            return
        run = None if self._stepwise else self._scheduler.begin_run()
        if run is not None:
            self._clock.begin(self._events.now_s, run.batch, run.context_tokens)
            self._beginning, self._fresh = self._fresh, []
            self._end_after(run.steps)
            return
        if not self._stepwise:
            for leg_id in self._writing:
                self.tell(leg_id)
        plan = self._scheduler.schedule(self._events.now_s)
        if plan is None:
            self._busy = False
            dropped = self._scheduler.expire(self._events.now_s)
            if dropped:
                self._on_outcome(DecodeOutcome((), dropped))
            self._on_scheduled()
            return
        shape = shape_of(plan)
        took_s = self._latency.step_s(shape)
        read = total_tokens(shape.prompts)
        self._used.step(self._events.now_s, took_s, read, shape.decode_batch)
        begun = (plan, self._events.now_s)
        self._events.at(self._events.now_s + took_s, STEP_END, self._step_ended, begun)
        self._on_scheduled()

    def _end_after(self, steps: int) -> None:
        self._runs += 1
        self._events.at(self._clock.end_after(steps), STEP_END, self._run_ended, self._runs)

    def _run_ended(self, number: int) -> None:
        if number == self._runs and self._clock.batch and not self._stopped:
            self._finish(self._clock.ends_after)

    def _finish(self, taken: int) -> None:
        """The run is over after so many steps, the last of which ends now."""
        clock, now_s = self._clock, self._events.now_s
        whole = taken == clock.ends_after
        self._note(taken, now_s)
        outcome = self._scheduler.complete_run(taken)
        self._used.step(clock.start_s, now_s - clock.start_s, 0, clock.batch, taken)
        clock.batch = 0
        self._busy = False
        for token in outcome.tokens:
            writing = self._writing[token.leg_id]
            self._tell(token.leg_id, token.output_index + 1, token.finish, self._pace(writing), now_s)
        if outcome.tokens or outcome.dropped or whole:
            self._on_outcome(outcome)
        self.kick()

    def _step_ended(self, begun: tuple[StepPlan, float]) -> None:
        if self._stopped:
            return
        plan, start_s = begun
        now_s = self._events.now_s
        left_s = self._left_s()
        if left_s > 0:
            self._used.longer(left_s)
            self._events.at(now_s + left_s, STEP_END, self._step_ended, begun)
            return
        drawn = [
            SampledToken(request.key, request.sample_index, TOKEN, None)
            for part in plan.slices
            for request in part.samples
        ]
        outcome = self._scheduler.complete(StepResult(plan.step, tuple(drawn), now_s - start_s), now_s)
        self._clock.step(now_s)
        self._busy = False
        for token in outcome.tokens:
            self._tell(token.leg_id, token.output_index + 1, token.finish, None, now_s)
        self._on_outcome(outcome)
        self.kick()

    def _note(self, taken: int, end_s: float) -> None:
        """Steps of the run up to the `taken`th are over: their ends and gaps."""
        first_step = self._clock.steps + 1
        first_s = self._clock.note(taken, end_s, bool(self._beginning))
        if first_s is not None:
            for writing in self._beginning:
                writing.first_step, writing.first_s = first_step, first_s

    def _pace(self, writing: Writing) -> Pace | None:
        return None if writing.first_s is None else self._clock.pace(writing.first_step, writing.first_s)


def shape_of(plan: StepPlan) -> StepShape:
    """A decode worker's step as a latency model sees it: samples fed several tokens read them as prompts."""
    prompts = tuple(
        [PromptPart(len(part.token_ids), part.start) for part in plan.slices if len(part.token_ids) > 1]
    )
    contexts = [part.start + 1 for part in plan.slices if len(part.token_ids) == 1]
    return StepShape(prompts, len(contexts), sum(contexts))
