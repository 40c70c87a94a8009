"""Pure: a simulated decode worker: the live scheduler and pulls, its steps timed by a model."""

from decode_worker.decode_leg import DecodeLeg, DecodeOutcome, SampleStart
from decode_worker.run_ahead import RunAheadScheduler
from engine.blocks import BlockPool
from engine.leg import DroppedLeg, DropReason
from planner.simulation.events import NEWS, EventQueue
from planner.simulation.pull import Pull, Pulls
from planner.simulation.router import LiveRequest, SimulatedRouter
from planner.simulation.setup import WorkerSpec
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
        router: SimulatedRouter,
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
        self._sources: dict[LegId, WorkerKey] = {}
        self._steps = DecodeSteps(
            self._scheduler,
            spec.latency,
            spec.left_s,
            events,
            used,
            stepwise,
            self._tell_tokens,
            self._stepped,
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
        """Queues a leg for its pull, or drops it."""
        session = live.session
        prompt_tokens = len(session.request.token_ids)
        known = len(leg.token_ids) - prompt_tokens
        decode = DecodeLeg(
            leg.leg_id,
            leg.token_ids,
            prompt_tokens,
            (SampleStart(0, tuple(session.samples[0].tokens[known:])),),
            session.request.sampling,
            session.request.priority,
            session.rules.deadline_s,
        )
        try:
            self._scheduler.add(decode, self._events.now_s)
        except Overloaded as error:
            self._drop(leg.leg_id, DropReason.OVERLOADED, str(error))
        except TandemError as error:
            self._drop(leg.leg_id, DropReason.TOO_LARGE, str(error))
        else:
            self._sources[leg.leg_id] = source
            self._steps.sync()
            self._pull_what_fits()

    def cancel(self, leg_id: LegId) -> None:
        """Stops a leg: its blocks come back within one step."""
        self._steps.sync()
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
        """A pull is over: its leg joins the batch, or is dropped."""
        leg_id = pull.leg_id
        self._sources.pop(leg_id, None)
        self._steps.sync()
        if not landed:
            self._scheduler.failed(leg_id)
            self._drop(leg_id, DropReason.HANDOFF_FAILED, "The pull failed.")
        else:
            self._steps.shorten()
            if self._scheduler.landed(leg_id, self._events.now_s):
                self._steps.joined(leg_id)
                self._router.landed(self.key, leg_id, "simulated", 0)
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
            source = self._sources[reservation.leg_id]
            self._pulls.begin(self, reservation, source, self.spec.block_size, leg.deadline_s)
        if reservations:
            self._steps.shorten_if_short()

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
        self._pull_what_fits()

    def _drop(self, leg_id: LegId, reason: DropReason, message: str) -> None:
        self._events.at(self._events.now_s, NEWS, self._tell_drop, DroppedLeg(leg_id, reason, message))

    def _tell_drop(self, drop: DroppedLeg) -> None:
        if self.alive:
            self._router.dropped(self.key, drop.leg_id, drop.reason, drop.message)
