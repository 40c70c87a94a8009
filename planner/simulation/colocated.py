"""Pure: a simulated worker that reads prompts and writes tokens itself, under a batching policy by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from engine.leg import DroppedLeg, DropReason
from planner.latency import StepShape, total_tokens
from planner.simulation.batching import Batch, BatchPolicy, Colocated, Limits
from planner.simulation.events import NEWS, STEP_BEGIN, STEP_END, EventQueue
from planner.simulation.gap_log import GapLog
from planner.simulation.mlfq import SkipJoinQueues
from planner.simulation.setup import WorkerSpec
from planner.simulation.site import LiveRequest, News
from planner.simulation.steps import Writing
from planner.simulation.utilisation import Utilisation
from router.leg import Leg
from router.timeline import Pace
from router.worker_key import WorkerKey
from router.worker_load import ReportedLoad
from tandem.errors import ConfigError, Overloaded, ProtocolError, TandemError
from tandem.ids import LegId
from tandem.sampling import FinishReason

POLICIES: Mapping[str, Callable[[Limits], BatchPolicy]] = MappingProxyType(
    {
        "prefill_first": lambda limits: Colocated(limits, chunked=False),
        "sarathi": lambda limits: Colocated(limits, chunked=True),
        "mlfq": SkipJoinQueues,
    }
)
"""By the name in a simulation's file."""


class ColocatedSite:
    """One life of a colocated worker."""

    def __init__(
        self, key: WorkerKey, spec: WorkerSpec, events: EventQueue, router: News, used: Utilisation
    ) -> None:
        """Raises ConfigError for an unknown policy."""
        if spec.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(sorted(POLICIES))}, not {spec.policy!r}.")
        self.key = key
        self.spec = spec
        self.alive = True
        self.draining = False
        self._policy = POLICIES[spec.policy](
            Limits(spec.pool_blocks, spec.block_size, spec.token_budget, spec.max_batch, spec.max_waiting)
        )
        self._events = events
        self._router = router
        self._used = used
        self._busy = False
        self._batch: Batch | None = None
        self._ends_after = 0
        self._version = 0
        self._start_s = 0.0
        self._decoded_s = 0.0
        self._steps = 0
        self._known: dict[LegId, int] = {}
        self._writing: dict[LegId, Writing] = {}
        self._gaps = GapLog()
        self._cancelled: list[LegId] = []

    @property
    def empty(self) -> bool:
        """Whether no leg is here."""
        return not self._known

    def start_prefill(self, live: LiveRequest, leg: Leg) -> None:
        """Queues a prompt, or drops it."""
        tokens = len(leg.token_ids)
        known = tokens - len(live.session.request.token_ids)
        left = (live.session.request.sampling.max_tokens or 1) - known
        try:
            self._policy.add(leg.leg_id, tokens, left)
        except Overloaded as error:
            self._drop(leg.leg_id, DropReason.OVERLOADED, str(error))
        except TandemError as error:
            self._drop(leg.leg_id, DropReason.TOO_LARGE, str(error))
        else:
            self._known[leg.leg_id] = known
            self._shorten()
            self._kick()

    def prefetch(self, live: LiveRequest, leg: Leg, source: WorkerKey, epoch: int) -> None:
        """Raises ProtocolError: no KV is handed over to a colocated worker."""
        raise ProtocolError("A colocated worker was asked to fetch KV.")

    def start_decode(self, live: LiveRequest, leg: Leg, source: WorkerKey) -> None:
        """Raises ProtocolError: no KV is handed over to a colocated worker."""
        raise ProtocolError("A colocated worker was given a leg to decode.")

    def cancel(self, leg_id: LegId) -> None:
        """Stops a leg within one step."""
        if leg_id in self._known:
            self._shorten()
            self._known.pop(leg_id)
            self._writing.pop(leg_id, None)
            self._cancelled.append(leg_id)
            self._kick()

    def tell(self, leg_id: LegId) -> None:
        """Tells the router all tokens of a leg that the steps up to now brought."""
        self._sync()
        writing = self._writing.get(leg_id)
        if writing is not None and writing.first_s is not None:
            upto = self._known[leg_id] + self._policy.drawn(leg_id)
            self._say(leg_id, upto, None, self._pace(writing), self._decoded_s)
            writing.first_s = None

    def load(self) -> ReportedLoad:
        """What its load message says."""
        tokens, waiting, running = self._policy.backlog
        free, total = self._policy.free_blocks, self.spec.pool_blocks
        return ReportedLoad(tokens, waiting, running, total, free, self.draining)

    def die(self) -> None:
        """Nothing of this life happens any more; what it wrote was told."""
        for leg_id in list(self._writing):
            self.tell(leg_id)
        self.alive = False

    def check_empty(self) -> None:
        """Raises ProtocolError unless every block came back."""
        if self._known or self._policy.free_blocks != self.spec.pool_blocks:
            raise ProtocolError(f"{self.key.worker_id} still holds blocks")

    def _kick(self) -> None:
        if not self._busy:
            self._busy = True
            self._events.at(self._events.now_s, STEP_BEGIN, self._begin, None)

    def _begin(self, _: None) -> None:
        if not self.alive:
            return
        for leg_id in self._cancelled:
            self._policy.cancel(leg_id)
        self._cancelled.clear()
        batch = self._policy.begin()
        if batch is None:
            self._busy = False
            return
        for leg_id in batch.preempted:
            self._told_before_preemption(leg_id)
        self._batch = batch
        self._start_s = self._events.now_s
        self._end_after(batch, batch.steps)

    def _end_after(self, batch: Batch, steps: int) -> None:
        self._version += 1
        self._ends_after = steps
        self._events.at(self._end_of(batch, steps), STEP_END, self._ended, self._version)

    def _end_of(self, batch: Batch, steps: int) -> float:
        """When a step of the batch in flight ends; several steps follow each other only without prompts."""
        latency = self.spec.latency
        if batch.prompts:
            shape = StepShape(batch.prompts, batch.decode_batch, batch.decode_context_tokens)
            return self._start_s + latency.step_s(shape)
        return self._start_s + latency.decode_run_s(batch.decode_batch, batch.decode_context_tokens, steps)

    def _ended(self, version: int) -> None:
        batch = self._batch
        if version != self._version or batch is None or not self.alive:
            return
        self._take(batch, self._ends_after)
        self._batch = None
        self._busy = False
        self._kick()

    def _take(self, batch: Batch, steps: int) -> None:
        """So many steps are over: what they wrote is told or noted."""
        end_s = self._end_of(batch, steps)
        took_s = end_s - self._start_s
        self._used.step(self._start_s, took_s, total_tokens(batch.prompts), batch.decode_batch, steps)
        if batch.decode_batch:
            self._note(batch, steps, end_s)
        for drawn in self._policy.complete(steps):
            known = self._known.get(drawn.leg_id)
            if known is None:
                continue
            writing = self._writing.get(drawn.leg_id)
            finish = FinishReason.LENGTH if drawn.ended else None
            pace = None if writing is None or writing.first_s is None else self._pace(writing)
            if writing is None and not drawn.ended and not self._policy.tells_all:
                self._writing[drawn.leg_id] = Writing()
            if drawn.ended:
                del self._known[drawn.leg_id]
                self._writing.pop(drawn.leg_id, None)
            self._say(drawn.leg_id, known + drawn.count, finish, pace, end_s)
        if not self._writing:
            self._gaps.clear()

    def _note(self, batch: Batch, steps: int, end_s: float) -> None:
        """Gaps before the tokens of these steps; legs that write their first here begin to be paced."""
        first_s = self._end_of(batch, 1)
        self._gaps.note(self._steps + 1, first_s - self._decoded_s)
        for writing in self._writing.values():
            if writing.first_s is None:
                writing.first_step, writing.first_s = self._steps + 1, first_s
        if steps > 1:
            last_s = self.spec.latency.decode_run_s(
                batch.decode_batch, batch.decode_context_tokens + (steps - 1) * batch.decode_batch, 1
            )
            self._gaps.note(self._steps + steps, last_s)
        self._steps += steps
        self._decoded_s = end_s

    def _sync(self) -> None:
        """Counts the steps of the run in flight that are over."""
        batch = self._batch
        if batch is None or batch.steps == 1:
            return
        now_s = self._events.now_s
        taken = 0
        while taken + 1 < self._ends_after and self._end_of(batch, taken + 1) <= now_s:
            taken += 1
        if taken:
            ends_after = self._ends_after - taken
            self._take(batch, taken)
            self._start_s = self._decoded_s
            self._batch = rest = self._policy.begin()
            if rest is None:
                raise ProtocolError("A run of steps was cut where it ends.")
            self._end_after(rest, min(ends_after, rest.steps))

    def _shorten(self) -> None:
        """The run in flight ends with the step in flight, because the batch is to change."""
        self._sync()
        if self._batch is not None and self._ends_after > 1:
            self._end_after(self._batch, 1)

    def _told_before_preemption(self, leg_id: LegId) -> None:
        """A leg leaves the batch with all that it wrote told."""
        writing = self._writing.pop(leg_id, None)
        if writing is not None and writing.first_s is not None:
            upto = self._known[leg_id] + self._policy.drawn(leg_id)
            self._say(leg_id, upto, None, self._pace(writing), self._decoded_s)

    def _pace(self, writing: Writing) -> Pace | None:
        if writing.first_s is None:
            return None
        return Pace(writing.first_s, self._gaps.longest_s(writing.first_step + 1))

    def _say(
        self, leg_id: LegId, upto: int, finish: FinishReason | None, pace: Pace | None, last_s: float
    ) -> None:
        self._router.tokens(self.key, leg_id, upto, finish, pace, last_s)

    def _drop(self, leg_id: LegId, reason: DropReason, message: str) -> None:
        self._events.at(self._events.now_s, NEWS, self._tell_drop, DroppedLeg(leg_id, reason, message))

    def _tell_drop(self, drop: DroppedLeg) -> None:
        if self.alive:
            self._router.dropped(self.key, drop.leg_id, drop.reason, drop.message)
