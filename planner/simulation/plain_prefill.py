"""Pure: a prefill worker of the plain course: PrefillScheduler's rules, blocks counted instead of named."""

from collections.abc import Callable

from planner.latency import PromptPart, StepShape
from planner.simulation.events import NEWS, STEP_BEGIN, STEP_END, EventQueue
from planner.simulation.plain_request import NotPlainError, PlainRequest
from planner.simulation.setup import WorkerSpec
from planner.simulation.utilisation import Utilisation
from router.worker_load import ReportedLoad, WorkerLoad

MAX_PARKED_FRACTION = 0.9
MAX_PASSED_BY = 8

Outcome = Callable[["PlainPrefill", list[PlainRequest]], None]
"""Told the requests whose prompts are read, in order."""


class PlainPrefill:
    """Counts the legs and blocks of one prefill worker."""

    def __init__(
        self, spec: WorkerSpec, load: WorkerLoad, events: EventQueue, used: Utilisation, on_read: Outcome
    ) -> None:
        self.spec = spec
        self.load = load
        self._events = events
        self._used = used
        self._on_read = on_read
        self._free = spec.pool_blocks
        self._parked_blocks = 0
        self._waiting: list[PlainRequest] = []
        self._running: list[PlainRequest] = []
        self._busy = False

    def add(self, request: PlainRequest) -> None:
        """Queues a prompt. Raises NotPlainError when the worker would refuse it."""
        size = self.spec.block_size
        request.blocks = -(-request.asked.prompt_tokens // size)
        if request.blocks > self.spec.pool_blocks or len(self._waiting) >= self.spec.max_waiting:
            raise NotPlainError
        self._waiting.append(request)
        self.kick()

    def release(self, request: PlainRequest) -> None:
        """The parked KV is elsewhere."""
        self._parked_blocks -= request.blocks
        self._free += request.blocks
        self.kick()

    def kick(self) -> None:
        """Begins a step, once all news of this instant is heard, if none is under way."""
        if not self._busy:
            self._busy = True
            self._events.at(self._events.now_s, STEP_BEGIN, self._begin, None)

    def report(self) -> ReportedLoad:
        """What its load message says."""
        ahead = [*self._waiting, *self._running]
        return ReportedLoad(
            waiting_prefill_tokens=sum([r.asked.prompt_tokens - r.computed for r in ahead]),
            waiting_legs=len(self._waiting),
            running_sequences=len(self._running),
            total_blocks=self.spec.pool_blocks,
            free_blocks=self._free,
        )

    def _begin(self, _: None) -> None:
        budget = self.spec.token_budget
        flying: list[PlainRequest] = []
        parts: list[PromptPart] = []
        waiting_runs = iter(self._running.copy())
        while budget > 0:
            room = budget if flying and self.spec.whole_prompts else None
            request = next(waiting_runs, None) or self._start_next(room)
            if request is None:
                break
            tokens = request.asked.prompt_tokens - request.computed
            if not self.spec.whole_prompts:
                tokens = min(budget, tokens)
            request.slice_tokens = tokens
            budget -= tokens
            parts.append(PromptPart(tokens, request.computed))
            flying.append(request)
        if not flying:
            self._busy = False
            return
        shape = StepShape(tuple(parts))
        took_s = self.spec.latency.stage_s(shape)
        lag_s = self.spec.latency.step_s(shape) - took_s
        now_s = self._events.now_s
        self._used.step(now_s, took_s, self.spec.token_budget - budget, 0)
        self._events.at(now_s + took_s, STEP_END, self._ended, (flying, lag_s))

    def _ended(self, ended: tuple[list[PlainRequest], float]) -> None:
        flying, lag_s = ended
        read: list[PlainRequest] = []
        for request in flying:
            request.computed += request.slice_tokens
            if request.computed == request.asked.prompt_tokens:
                self._running.remove(request)
                read.append(request)
                if request.asked.output_tokens == 1:
                    self._free += request.blocks
                else:
                    self._parked_blocks += request.blocks
        self._busy = False
        if lag_s > 0:
            self._events.at(self._events.now_s + lag_s, NEWS, self._tell, read)
        else:
            self._tell(read)
        self.kick()

    def _tell(self, read: list[PlainRequest]) -> None:
        if read:
            self._on_read(self, read)

    def _start_next(self, room: int | None) -> PlainRequest | None:
        """The first waiting prompt whose blocks can be had, unless one ahead was passed by too often."""
        if self._parked_blocks > MAX_PARKED_FRACTION * self.spec.pool_blocks:
            return None
        for place, request in enumerate(self._waiting):
            if room is not None and request.asked.prompt_tokens > room:
                return None
            if request.blocks <= self._free:
                for ahead in self._waiting[:place]:
                    ahead.passed_by += 1
                self._free -= request.blocks
                del self._waiting[place]
                self._running.append(request)
                return request
            if request.passed_by >= MAX_PASSED_BY or place + 1 > MAX_PASSED_BY:
                return None
        return None
