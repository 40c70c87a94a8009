"""Pure: a simulated decode worker: the live scheduler and pulls, its steps timed by a model."""

from decode_worker.decode_leg import DecodeLeg, DecodeOutcome, SampleStart
from decode_worker.run_ahead import RunAheadScheduler
from engine.kv.blocks import BlockPool
from engine.leg import DroppedLeg, DropReason
from planner.simulation.events import NEWS, EventQueue
from planner.simulation.pull import Pull, Pulls
from planner.simulation.setup import WorkerSpec
from planner.simulation.site import LiveRequest, News
from planner.simulation.steps import DecodeSteps
from planner.simulation.utilisation import Utilisation
from router.leg import Leg
from router.timeline import Pace
from router.worker_key import WorkerKey
from router.worker_load import ReportedLoad
from tandem.errors import Overloaded, ProtocolError, TandemError
from tandem.ids import LegId
from tandem.sampling import FinishReason


class DecodeSite:
    """One life of a decode worker."""

    def __init__(
        self,
        key: WorkerKey,
        spec: WorkerSpec,
        events: EventQueue,
        router: News,
        pulls: Pulls,
        context_tokens: int,
        used: Utilisation,
        stepwise: bool,
    ) -> None:
        self.key = key
        self.spec = spec
        self.alive = True
        self.draining = False
        self.pool = BlockPool(spec.pool_blocks, spec.block_size, prefix_cache=spec.prefix_cache)
        self._scheduler = RunAheadScheduler(
            self.pool, max_batch=spec.max_batch, max_waiting=spec.max_waiting, context_tokens=context_tokens
        )
        self._events = events
        self._router = router
        self._pulls = pulls
        self._sources: dict[LegId, tuple[WorkerKey, int]] = {}
        self._landed_early: set[LegId] = set()
        self._steps = DecodeSteps(
            self._scheduler,
            spec.latency,
            spec.left_s,
            events,
            used,
            stepwise,
            self._tell_tokens,
            self._stepped,
            self._end_lost,
        )

    @property
    def node(self) -> str:
        """The machine it is in."""
        return self.spec.node

    @property
    def empty(self) -> bool:
        """Whether no leg is here."""
        return not self._scheduler.legs()

    def start_prefill(self, live: LiveRequest, leg: Leg) -> None:
        """Raises ProtocolError: a decode worker reads no prompts."""
        raise ProtocolError("A decode worker was given a prompt.")

    def start_decode(self, live: LiveRequest, leg: Leg, source: WorkerKey) -> None:
        """Queues a leg for its pull, or drops it; one that is fetched early goes on."""
        leg_id, known = leg.leg_id, len(leg.token_ids) - len(live.session.request.token_ids)
        decode = _decode_leg(live, leg, tuple(live.session.samples[0].tokens[known:]))
        early = self._scheduler.fetched_early(leg_id)
        self._steps.sync()
        try:
            if early:
                self._go_on(decode)
            else:
                self._scheduler.add(decode, self._events.now_s)
        except Overloaded as error:
            self._drop(leg_id, DropReason.OVERLOADED, str(error))
        except TandemError as error:
            self.cancel(leg_id)
            self._drop(leg_id, DropReason.TOO_LARGE, str(error))
        else:
            if not early:
                self._sources[leg_id] = (source, leg.epoch)
            self._pull_what_fits()

    def prefetch(self, live: LiveRequest, leg: Leg, source: WorkerKey, epoch: int) -> None:
        """Queues the pull of a leg that is still being read, or says by an event that it does not."""
        self._steps.sync()
        try:
            if self.draining:
                raise Overloaded("The worker drains.", 1.0)
            self._scheduler.prefetch(_decode_leg(live, leg, ()), self._events.now_s)
        except TandemError:
            self._events.at(self._events.now_s, NEWS, self._tell_lost, leg.leg_id)
        else:
            self._sources[leg.leg_id] = (source, epoch)
            self._pull_what_fits()

    def cancel(self, leg_id: LegId) -> None:
        """Stops a leg: its blocks come back within one step."""
        self._steps.sync()
        self._landed_early.discard(leg_id)
        if self._scheduler.cancel(leg_id):
            self._pulls.cancel(leg_id)
            return
        self._steps.shorten()
        self._steps.forget(leg_id)
        self._sources.pop(leg_id, None)
        self._pull_what_fits()
        self._steps.kick()

    def tell(self, leg_id: LegId) -> None:
        """Tells the router all tokens of a leg that have come by now."""
        self._steps.tell(leg_id)

    def pull_ended(self, pull: Pull, landed: bool) -> None:
        """A pull is over: its leg joins the batch once it is started, or is dropped."""
        leg_id = pull.leg_id
        self._sources.pop(leg_id, None)
        self._steps.sync()
        early, wanted = self._scheduler.fetched_early(leg_id), self._scheduler.holds(leg_id)
        if landed:
            self._steps.shorten()
            if self._scheduler.landed(leg_id, self._events.now_s):
                self._joined(leg_id)
            elif early:
                self._landed_early.add(leg_id)
        else:
            self._scheduler.failed(leg_id)
            if early:
                self._tell_lost(leg_id)
            elif wanted:
                self._drop(leg_id, DropReason.HANDOFF_FAILED, "The pull failed.")
        self._pull_what_fits()
        self._steps.kick()

    def load(self) -> ReportedLoad:
        """What its load message says."""
        self._steps.sync()
        waiting, running = self._scheduler.queue_lengths()
        return ReportedLoad(
            waiting_legs=waiting,
            running_sequences=running,
            total_blocks=self.pool.num_blocks,
            free_blocks=self.pool.free_blocks,
            draining=self.draining,
        )

    def die(self) -> None:
        """Nothing of this life happens any more; what it wrote was told."""
        self._steps.stop()
        self.alive = False

    def check_empty(self) -> None:
        """Raises ProtocolError unless every block came back."""
        self.pool.check_integrity(self._scheduler.held_blocks())
        if not self.empty or self.pool.allocated_blocks:
            raise ProtocolError(f"{self.key.worker_id} still holds {self.pool.allocated_blocks} blocks")

    def _pull_what_fits(self) -> None:
        reservations = self._scheduler.reserve(self._events.now_s)
        for reservation in reservations:
            leg = self._scheduler.leg(reservation.leg_id)
            self._pulls.begin(self, reservation, self._sources[reservation.leg_id], leg.deadline_s)
        if reservations:
            self._steps.shorten_if_short()

    def _go_on(self, leg: DecodeLeg) -> None:
        """Starts a leg that is fetched early; when its KV is here it joins at once."""
        self._steps.shorten()
        if self._scheduler.start(leg):
            self._landed_early.remove(leg.leg_id)
            self._joined(leg.leg_id)
            self._steps.kick()

    def _joined(self, leg_id: LegId) -> None:
        self._steps.joined(leg_id)
        self._router.landed(self.key, leg_id, "simulated", 0)

    def _end_lost(self) -> None:
        """Ends the early fetches that the scheduler gave up."""
        for lost in self._scheduler.take_lost():
            self._landed_early.discard(lost.leg_id)
            if lost.pulling:
                self._pulls.cancel(lost.leg_id)
            self._sources.pop(lost.leg_id, None)
            self._tell_lost(lost.leg_id)

    def _tell_tokens(
        self, leg_id: LegId, upto: int, finish: FinishReason | None, pace: Pace | None, last_s: float
    ) -> None:
        if finish is not None:
            self._steps.forget(leg_id)
        self._router.tokens(self.key, leg_id, upto, finish, pace, last_s)

    def _stepped(self, outcome: DecodeOutcome) -> None:
        for drop in outcome.dropped:
            self._steps.forget(drop.leg_id)
            self._router.dropped(self.key, drop.leg_id, drop.reason, drop.message)
        self._end_lost()
        self._pull_what_fits()

    def _drop(self, leg_id: LegId, reason: DropReason, message: str) -> None:
        self._events.at(self._events.now_s, NEWS, self._tell_drop, DroppedLeg(leg_id, reason, message))

    def _tell_drop(self, drop: DroppedLeg) -> None:
        if self.alive:
            self._router.dropped(self.key, drop.leg_id, drop.reason, drop.message)

    def _tell_lost(self, leg_id: LegId) -> None:
        if self.alive:
            self._router.prefetch_lost(self.key, leg_id)


def _decode_leg(live: LiveRequest, leg: Leg, tokens: tuple[int, ...]) -> DecodeLeg:
    """What the worker is told of a leg; `tokens` are those of its sample that the prompt does not hold."""
    request = live.session.request
    return DecodeLeg(
        leg.leg_id,
        leg.token_ids,
        len(request.token_ids),
        (SampleStart(0, tokens),),
        request.sampling,
        request.priority,
        live.session.rules.deadline_s,
    )
