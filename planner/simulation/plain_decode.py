"""Pure: a decode worker of the plain course: the live rule of room, blocks counted instead of named."""

import heapq
from collections import deque
from collections.abc import Callable

from decode_worker.room import RoomRules
from engine.length_sums import LengthSums
from planner.simulation.events import STEP_BEGIN, STEP_END, EventQueue
from planner.simulation.gap_log import GapLog
from planner.simulation.plain_request import NotPlainError, PlainRequest
from planner.simulation.setup import WorkerSpec
from planner.simulation.utilisation import Utilisation
from router.timeline import Pace
from router.worker_load import ReportedLoad, WorkerLoad


class PlainDecode:
    """Counts the legs and blocks of one decode worker, and advances its batch in runs of steps.

    The batch is sums and a clock of steps, as in decode_worker/run_ahead.py.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        load: WorkerLoad,
        events: EventQueue,
        used: Utilisation,
        pull: Callable[["PlainDecode", PlainRequest], None],
        on_written: Callable[["PlainDecode", PlainRequest, Pace], None],
    ) -> None:
        self.spec = spec
        self.load = load
        self._events = events
        self._used = used
        self._pull = pull
        self._on_written = on_written
        self._size = spec.block_size
        self._room = RoomRules(spec.max_batch)
        self._free = spec.pool_blocks
        self._waiting: deque[PlainRequest] = deque()
        self._pulling = 0
        self._joining: list[PlainRequest] = []
        self._sums = LengthSums(spec.block_size)
        self._ends: list[tuple[int, int, PlainRequest]] = []
        self._numbers = 0
        self._gaps = GapLog()
        self._busy = False
        self._beginning: list[PlainRequest] = []
        self._runs = 0
        self._run_batch = 0
        self._run_context = 0
        self._run_steps = 0
        self._ends_after = 0
        self._taken = 0
        # The step of the run whose end was asked for last, and that end.
        self._ahead = 0
        self._ahead_s = 0.0
        self._start_s = 0.0
        self._last_end_s = 0.0

    def add(self, request: PlainRequest) -> None:
        """Queues a leg for its pull. Raises NotPlainError when the worker would refuse it."""
        spec = self.spec
        if request.asked.prompt_tokens + 1 > spec.pool_blocks * self._size:
            raise NotPlainError
        if len(self._waiting) >= spec.max_waiting:
            raise NotPlainError
        self._numbers += 1
        request.number = self._numbers
        self._waiting.append(request)
        self._pull_what_fits()

    def landed(self, request: PlainRequest) -> None:
        """Its KV is here: it joins the batch at the next step."""
        self._sync()
        if self._run_batch and self._ends_after > self._taken + 1:
            self._end_after(self._taken + 1)
        self._pulling -= 1
        self._joining.append(request)

    def after_landing(self) -> None:
        """The router has heard of it."""
        self._pull_what_fits()
        self.kick()

    def kick(self) -> None:
        """Begins a step, once all news of this instant is heard, if none is under way."""
        if not self._busy:
            self._busy = True
            self._events.at(self._events.now_s, STEP_BEGIN, self._begin, None)

    def report(self) -> ReportedLoad:
        """What its load message says."""
        self._sync()
        return ReportedLoad(
            waiting_legs=len(self._waiting) + self._pulling,
            running_sequences=self._sums.count + len(self._joining),
            total_blocks=self.spec.pool_blocks,
            free_blocks=self._free,
        )

    def _pull_what_fits(self) -> None:
        taken = False
        while self._waiting:
            request = self._waiting[0]
            ahead = self._sums.count + len(self._joining) + self._pulling
            needed = self._room.blocks_needed(request.blocks, 1, ahead)
            if needed is None:
                break
            # As long as blocks abound, nobody needs to know how far the run in flight has come.
            if needed + self._most_growth() > self._free:
                self._sync()
                taken = True
                if needed > self._free:
                    break
            self._waiting.popleft()
            self._free -= request.blocks
            self._pulling += 1
            self._pull(self, request)
        if taken and self._run_batch:
            left = self._run_steps - self._taken
            short = self._sums.growth(left) > self._free + self._sums.growth_next()
            if short and self._ends_after > self._taken + 1:
                self._end_after(self._taken + 1)

    def _most_growth(self) -> int:
        """No fewer blocks than the run in flight may still need."""
        return (self._run_steps // self._size + 1) * self._run_batch

    def _begin(self, _: None) -> None:
        for request in self._joining:
            prompt = request.asked.prompt_tokens
            request.joined_clock = self._sums.clock
            end = self._sums.clock + request.asked.output_tokens - 1
            heapq.heappush(self._ends, (end, request.number, request))
            self._sums.join(prompt)
        self._beginning, self._joining = self._joining, []
        if not self._sums.count:
            self._busy = False
            return
        steps = self._sums.steps_with_blocks(self._free, self._ends[0][0] - self._sums.clock)
        if steps == 0:
            raise NotPlainError
        self._free -= self._sums.growth_next()
        self._start_s = self._events.now_s
        self._taken = self._ahead = 0
        self._run_batch, self._run_context, self._run_steps = (
            self._sums.count,
            self._sums.context_tokens,
            steps,
        )
        self._end_after(steps)

    def _end_after(self, steps: int) -> None:
        self._runs += 1
        self._ends_after = steps
        end_s = self._ahead_s if steps == self._ahead else self._end_of(steps)
        self._events.at(end_s, STEP_END, self._run_ended, self._runs)

    def _run_ended(self, run: int) -> None:
        if run == self._runs and self._run_batch:
            self._finish(self._ends_after)

    def _sync(self) -> None:
        """Counts the steps of the run in flight that are over."""
        if not self._run_batch:
            return
        taken, end_s = self._taken_by_now()
        if taken == self._taken:
            return
        if end_s == self._events.now_s:
            self._finish(taken)
            return
        self._note(taken, end_s)

    def _finish(self, taken: int) -> None:
        """The run is over after so many steps, the last of which ends now."""
        whole = taken == self._ends_after
        now_s = self._events.now_s
        self._note(taken, now_s)
        self._free += self._sums.growth_next()
        self._used.step(self._start_s, now_s - self._start_s, 0, self._run_batch, taken)
        self._run_batch = 0
        self._busy = False
        ended: list[PlainRequest] = []
        while self._ends and self._ends[0][0] == self._sums.clock:
            ended.append(heapq.heappop(self._ends)[2])
        for request in ended:
            self._leave(request)
        for request in ended:
            pace = Pace(request.first_s, self._gaps.longest_s(request.first_step + 1))
            self._on_written(self, request, pace)
        if not self._sums.count and not self._joining:
            self._gaps.clear()
        if whole:
            self._pull_what_fits()
        self.kick()

    def _leave(self, request: PlainRequest) -> None:
        computed = request.asked.prompt_tokens + self._sums.clock - request.joined_clock
        self._sums.leave(computed)
        self._free += -(-computed // self._size)

    def _note(self, taken: int, end_s: float) -> None:
        """Steps of the run up to the `taken`th, which ended then, are over; the next one has its blocks."""
        clock, batch = self._sums.clock, self._run_batch
        if self._taken == 0 and (self._beginning or self._start_s > self._last_end_s):
            first_s = end_s if taken == 1 else self._end_of(1)
            self._gaps.note(clock + 1, first_s - self._last_end_s)
            for request in self._beginning:
                request.first_step, request.first_s = clock + 1, first_s
        steps = taken - self._taken
        self._free -= self._sums.growth(steps + 1) - self._sums.growth_next()
        self._sums.take(steps)
        longest_s = end_s - max(self._last_end_s, self._start_s)
        if steps > 1:
            context = self._run_context + (taken - 1) * batch
            longest_s = self.spec.latency.decode_run_s(batch, context, 1)
        self._gaps.note(self._sums.clock, longest_s)
        self._taken = taken
        self._last_end_s = end_s

    def _end_of(self, step: int) -> float:
        return self._start_s + self.spec.latency.decode_run_s(self._run_batch, self._run_context, step)

    def _taken_by_now(self) -> tuple[int, float]:
        """Steps of the run that are over, and when the last of them ended."""
        now_s = self._events.now_s
        guess = self.spec.latency.decode_steps_within(
            self._run_batch, self._run_context, now_s - self._start_s
        )
        taken = max(self._taken, min(guess, self._ends_after - 1))
        end_s = self._end_of(taken)
        while taken > self._taken and end_s > now_s:
            taken -= 1
            end_s = self._end_of(taken)
        while taken + 1 < self._ends_after:
            self._ahead, self._ahead_s = taken + 1, self._end_of(taken + 1)
            if self._ahead_s > now_s:
                break
            taken, end_s = self._ahead, self._ahead_s
        return taken, end_s
