"""Edge: drives a pure scheduler and the torch thread, one step at a time."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, Protocol, TypeVar, runtime_checkable

from engine.contract import LayerListener, PipelinedRunner, StepInFlight, StepRunner
from engine.leg import DroppedLeg
from engine.step import StepPlan, StepResult

OutcomeT = TypeVar("OutcomeT")
OutcomeT_co = TypeVar("OutcomeT_co", covariant=True)


class StepScheduler(Protocol[OutcomeT_co]):
    """What the loop asks of a scheduler; at most one plan is in flight between schedule and complete."""

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next step, or None when there is nothing to compute."""
        ...

    def complete(self, result: StepResult, now_s: float) -> OutcomeT_co:
        """Takes the result of the plan in flight."""
        ...

    def expire(self, now_s: float) -> tuple[DroppedLeg, ...]:
        """Drops the legs whose deadline passed."""
        ...

    def next_deadline_s(self) -> float | None:
        """When `expire` has something to do next."""
        ...


@runtime_checkable
class FollowingScheduler(Protocol):
    """A scheduler that can plan a step before it knows the result of the one in flight."""

    def schedule_following(self) -> StepPlan | None:
        """The step after the one in flight, or None when that one's result is needed first."""
        ...


class StepLoop(Generic[OutcomeT]):
    """Schedules, runs and completes steps until cancelled.

    The scheduler lives on the event loop; the runner runs on `torch_thread`, which must have one thread only.
    `on_scheduled`, `on_outcome` and `on_expired` are called on the event loop and must not block.
    `on_scheduled` hears of each plan before it runs (None: there is nothing to compute) and may return who is
    to be told, on the event loop and before the plan's `on_outcome`, how many layers of it are done.
    With a PipelinedRunner and a FollowingScheduler a step is begun while the one before is computed;
    `on_scheduled` does not hear of such a step.
    """

    def __init__(
        self,
        scheduler: StepScheduler[OutcomeT],
        runner: StepRunner,
        torch_thread: Executor,
        clock: Callable[[], float],
        on_outcome: Callable[[StepPlan, StepResult, OutcomeT], None],
        on_expired: Callable[[tuple[DroppedLeg, ...]], None],
        on_scheduled: Callable[[StepPlan | None], LayerListener | None] = lambda _plan: None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._torch_thread = torch_thread
        self._clock = clock
        self._on_outcome = on_outcome
        self._on_expired = on_expired
        self._on_scheduled = on_scheduled
        self._work = asyncio.Event()
        self._running_since_s: float | None = None
        self._stepped_s = 0.0
        self.steps = 0
        self._pipeline: tuple[PipelinedRunner, FollowingScheduler] | None = None
        if isinstance(runner, PipelinedRunner) and isinstance(scheduler, FollowingScheduler):
            self._pipeline = (runner, scheduler)

    def wake(self) -> None:
        """Says that the scheduler may have something new to do."""
        self._work.set()

    def stalled_s(self) -> float:
        """Seconds that the step in flight has been running; 0 between steps."""
        return 0.0 if self._running_since_s is None else self._clock() - self._running_since_s

    def busy_s(self) -> float:
        """Seconds spent in steps since the start, the one in flight included."""
        return self._stepped_s + self.stalled_s()

    async def run(self) -> None:
        """Runs until cancelled; an error of the runner ends it, since KV may be half written then."""
        loop = asyncio.get_running_loop()
        while True:
            self._expire()
            self._work.clear()
            plan = self._scheduler.schedule(self._clock())
            listener = self._on_scheduled(plan)
            if plan is None:
                await self._wait_for_work()
                continue
            on_layers = None if listener is None else _on_loop(loop, listener)
            self._running_since_s = self._clock()
            if self._pipeline is not None:
                await self._run_pipelined(*self._pipeline, plan, on_layers)
                continue
            result = await loop.run_in_executor(self._torch_thread, self._runner.run, plan, on_layers)
            self._complete(plan, result)

    async def _run_pipelined(
        self,
        runner: PipelinedRunner,
        scheduler: FollowingScheduler,
        plan: StepPlan,
        on_layers: LayerListener | None,
    ) -> None:
        """Runs a step, and further ones as long as each can be planned before the last one's result."""
        loop, thread = asyncio.get_running_loop(), self._torch_thread
        in_flight = await loop.run_in_executor(thread, runner.begin, plan, on_layers)
        while True:
            self._expire()
            following = scheduler.schedule_following()
            if following is None:
                self._complete(plan, await loop.run_in_executor(thread, in_flight.result))
                return
            result, next_in_flight = await loop.run_in_executor(
                thread, _begin_and_wait, runner, following, in_flight
            )
            self._complete(plan, result)
            plan, in_flight = following, next_in_flight
            self._running_since_s = self._clock()

    def _complete(self, plan: StepPlan, result: StepResult) -> None:
        self._stepped_s += self.stalled_s()
        self._running_since_s = None
        self.steps += 1
        self._on_outcome(plan, result, self._scheduler.complete(result, self._clock()))

    def _expire(self) -> None:
        deadline_s = self._scheduler.next_deadline_s()
        now_s = self._clock()
        if deadline_s is not None and deadline_s <= now_s:
            dropped = self._scheduler.expire(now_s)
            if dropped:
                self._on_expired(dropped)

    async def _wait_for_work(self) -> None:
        deadline_s = self._scheduler.next_deadline_s()
        wait_s = None if deadline_s is None else max(0.0, deadline_s - self._clock())
        try:
            async with asyncio.timeout(wait_s):
                await self._work.wait()
        except TimeoutError:
            return


def _begin_and_wait(
    runner: PipelinedRunner, following: StepPlan, in_flight: StepInFlight
) -> tuple[StepResult, StepInFlight]:
    """In the torch thread: the device has the following step before it has done the one in flight."""
    begun = runner.begin(following)
    return in_flight.result(), begun


def _on_loop(loop: asyncio.AbstractEventLoop, listener: LayerListener) -> LayerListener:
    """Told from any thread, tells the listener on the loop."""
    return lambda layers: loop.call_soon_threadsafe(listener, layers)
