"""Pure: a prefill worker of the plain course: the live rules of reading, blocks counted instead of named."""

from collections.abc import Callable

from engine.leg_bounds import check_pool, check_queue
from planner.latency import PromptPart, StepShape
from planner.simulation.events import NEWS, STEP_BEGIN, STEP_END, EventQueue
from planner.simulation.plain_request import NotPlainError, PlainRequest
from planner.simulation.setup import WorkerSpec
from planner.simulation.utilisation import Utilisation
from prefill_worker.reading_order import ReadingRules
from router.worker_load import ReportedLoad, WorkerLoad
from tandem.errors import TandemError

Outcome = Callable[["PlainPrefill", list[PlainRequest]], None]
"""Told the requests whose prompts are read, in order."""


class PlainPrefill:
    """Counts the legs and blocks of one prefill worker."""

    def __init__(
        self, spec: WorkerSpec, load: WorkerLoad, events: EventQueue, used: Utilisation, on_read: Outcome
    ) -> None:
        self.spec = spec
        self.load = load
        self._rules = ReadingRules.of_pool(spec.pool_blocks, spec.token_budget, spec.whole_prompts)
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
        request.blocks = -(-request.tokens // size)
        try:
            check_pool(request.tokens, self.spec.pool_blocks * size)
            check_queue(len(self._waiting), self.spec.max_waiting)
        except TandemError as error:
            raise NotPlainError from error
        self._waiting.append(request)
        self.kick()

    def release(self, request: PlainRequest) -> None:
        """The parked KV is elsewhere."""
        self._parked_blocks -= request.blocks
        self._free += request.blocks
        self.kick()

    def kick(self) -> None:
        """Begins a step, once all news of this instant is heard, if there is one to begin."""
        if not self._busy and (self._waiting or self._running):
            self._busy = True
            self._events.at(self._events.now_s, STEP_BEGIN, self._begin, None)

    def report(self) -> ReportedLoad:
        """What its load message says."""
        ahead = [*self._waiting, *self._running]
        return ReportedLoad(
            waiting_prefill_tokens=sum([request.tokens - request.computed for request in ahead]),
            waiting_legs=len(self._waiting),
            running_sequences=len(self._running),
            total_blocks=self.spec.pool_blocks,
            free_blocks=self._free,
        )

    def _begin(self, _: None) -> None:
        flying = self._rules.fill_step(self._running.copy(), self._start_next)
        if not flying:
            self._busy = False
            return
        shape = StepShape(tuple([PromptPart(tokens, request.computed) for request, tokens in flying]))
        took_s = self.spec.latency.stage_s(shape)
        lag_s = self.spec.latency.step_s(shape) - took_s
        now_s = self._events.now_s
        self._used.step(now_s, took_s, sum([tokens for _, tokens in flying]), 0)
        self._events.at(now_s + took_s, STEP_END, self._ended, (flying, lag_s))

    def _ended(self, ended: tuple[list[tuple[PlainRequest, int]], float]) -> None:
        flying, lag_s = ended
        read: list[PlainRequest] = []
        for request, tokens in flying:
            request.computed += tokens
            if request.computed == request.tokens:
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
        request = self._rules.next_to_start(self._waiting, self._parked_blocks, room, self._take_blocks)
        if request is not None:
            self._waiting.remove(request)
            self._running.append(request)
        return request

    def _take_blocks(self, request: PlainRequest) -> bool:
        if request.blocks > self._free:
            return False
        self._free -= request.blocks
        return True
