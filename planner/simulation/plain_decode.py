"""Pure: a decode worker of the plain course: the live rule of room, blocks counted instead of named."""

import heapq
from collections import deque
from collections.abc import Callable

from decode_worker.room import RoomRules
from engine.kv.length_sums import LengthSums
from engine.leg_bounds import check_pool, check_queue
from planner.simulation.events import STEP_BEGIN, STEP_END, EventQueue
from planner.simulation.plain_request import NotPlainError, PlainRequest
from planner.simulation.run_clock import RunClock
from planner.simulation.setup import WorkerSpec
from planner.simulation.utilisation import Utilisation
from router.timeline import Pace
from router.worker_load import ReportedLoad, WorkerLoad
from tandem.errors import TandemError


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
        self._clock = RunClock(spec.latency)
        self._busy = False
        self._beginning: list[PlainRequest] = []
        self._runs = 0
        self._run_steps = 0

    def add(self, request: PlainRequest) -> None:
        """Queues a leg for its pull. Raises NotPlainError when the worker would refuse it."""
        spec = self.spec
        try:
            check_pool(request.tokens + 1, spec.pool_blocks * self._size)
            check_queue(len(self._waiting), spec.max_waiting)
        except TandemError as error:
            raise NotPlainError from error
        self._numbers += 1
        request.number = self._numbers
        self._waiting.append(request)
        self._pull_what_fits()

    def landed(self, request: PlainRequest) -> None:
        """Its KV is here: it joins the batch at the next step."""
        self._sync()
        self._shorten()
        self._pulling -= 1
        self._joining.append(request)

    def after_landing(self) -> None:
        """The router has heard of it."""
        self._pull_what_fits()
        self.kick()

    def kick(self) -> None:
        """Begins a step, once all news of this instant is heard, if there is one to begin."""
        if not self._busy and (self._joining or self._sums.count):
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
        if taken and self._clock.batch:
            left = self._run_steps - self._clock.taken
            if self._sums.growth(left) > self._free + self._sums.growth_next():
                self._shorten()

    def _shorten(self) -> None:
        """The run in flight ends with the step in flight, because the batch is to change."""
        clock = self._clock
        if clock.batch and clock.ends_after > clock.taken + 1:
            self._end_after(clock.taken + 1)

    def _most_growth(self) -> int:
        """No fewer blocks than the run in flight may still need."""
        return (self._run_steps // self._size + 1) * self._clock.batch

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
        self._run_steps = steps
        self._clock.begin(self._events.now_s, self._sums.count, self._sums.context_tokens)
        self._end_after(steps)

    def _end_after(self, steps: int) -> None:
        self._runs += 1
        self._events.at(self._clock.end_after(steps), STEP_END, self._run_ended, self._runs)

    def _run_ended(self, run: int) -> None:
        if run == self._runs and self._clock.batch:
            self._finish(self._clock.ends_after)

    def _sync(self) -> None:
        """Counts the steps of the run in flight that are over."""
        if not self._clock.batch:
            return
        taken, end_s = self._clock.taken_by_now(self._events.now_s)
        if taken == self._clock.taken:
            return
        if end_s == self._events.now_s:
            self._finish(taken)
        else:
            self._note(taken, end_s)

    def _finish(self, taken: int) -> None:
        """The run is over after so many steps, the last of which ends now."""
        clock, now_s = self._clock, self._events.now_s
        whole = taken == clock.ends_after
        self._note(taken, now_s)
        self._free += self._sums.growth_next()
        self._used.step(clock.start_s, now_s - clock.start_s, 0, clock.batch, taken)
        clock.batch = 0
        self._busy = False
        ended: list[PlainRequest] = []
        while self._ends and self._ends[0][0] == self._sums.clock:
            ended.append(heapq.heappop(self._ends)[2])
        for request in ended:
            self._leave(request)
        for request in ended:
            self._on_written(self, request, clock.pace(request.first_step, request.first_s))
        if not self._sums.count and not self._joining:
            clock.forget_gaps()
        if whole:
            self._pull_what_fits()
        self.kick()

    def _leave(self, request: PlainRequest) -> None:
        computed = request.asked.prompt_tokens + self._sums.clock - request.joined_clock
        self._sums.leave(computed)
        self._free += -(-computed // self._size)

    def _note(self, taken: int, end_s: float) -> None:
        """Steps of the run up to the `taken`th, which ended then, are over; the next one has its blocks."""
        first_step, steps = self._clock.steps + 1, taken - self._clock.taken
        first_s = self._clock.note(taken, end_s, bool(self._beginning))
        if first_s is not None:
            for request in self._beginning:
                request.first_step, request.first_s = first_step, first_s
        self._free -= self._sums.growth(steps + 1) - self._sums.growth_next()
        self._sums.take(steps)
