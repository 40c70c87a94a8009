"""Pure: a simulated prefill worker: the live scheduler and hand-off sources, steps timed by a model."""

from collections.abc import Callable

from decode_worker.grown_tokens import TOKEN
from engine.kv.blocks import BlockPool
from engine.leg import DroppedLeg, DropReason
from engine.step import SampledToken, StepPlan, StepResult
from kvtransfer.contract import HandoffKey, KvReady
from kvtransfer.handoffs.source_protocol import SourceHandoff, SourceInput
from kvtransfer.handoffs.words import ReleaseReason, SourceTimes
from planner.latency import PromptPart, StepShape, total_tokens
from planner.simulation.events import NEWS, STEP_BEGIN, STEP_END, EventQueue
from planner.simulation.offer import Offer
from planner.simulation.setup import EarlyFetch, WorkerSpec
from planner.simulation.site import LiveRequest, News
from planner.simulation.utilisation import Utilisation
from prefill_worker.prefill_leg import OfferedLeg, PrefillLeg, PrefillOutcome
from prefill_worker.scheduler import PrefillScheduler
from router.leg import Leg
from router.worker_key import WorkerKey
from router.worker_load import ReportedLoad
from tandem.errors import Overloaded, ProtocolError, TandemError
from tandem.ids import LegId


class PrefillSite:
    """One life of a prefill worker."""

    def __init__(
        self,
        key: WorkerKey,
        spec: WorkerSpec,
        events: EventQueue,
        router: News,
        times: SourceTimes,
        context_tokens: int,
        used: Utilisation,
        early: EarlyFetch | None,
        on_grown: Callable[[LegId], None],
    ) -> None:
        """`on_grown` is told when more of an offer is ready, or will be as the step goes on."""
        self.key = key
        self.spec = spec
        self.alive = True
        self.draining = False
        self.offers: dict[LegId, Offer] = {}
        self.pool = BlockPool(spec.pool_blocks, spec.block_size, prefix_cache=spec.prefix_cache)
        self._scheduler = PrefillScheduler(
            self.pool,
            token_budget=spec.token_budget,
            max_waiting=spec.max_waiting,
            context_tokens=context_tokens,
            eos_ids=(),
            whole_prompts=spec.whole_prompts,
            overlap_min_tokens=None if early is None else early.min_tokens,
        )
        self._on_grown = on_grown
        self._events = events
        self._router = router
        self._times = times
        self._layers = 1 if early is None else early.layers
        self._used = used
        self._busy = False

    @property
    def empty(self) -> bool:
        """Whether no leg is here."""
        return not self._scheduler.legs()

    def start_prefill(self, live: LiveRequest, leg: Leg) -> None:
        """Queues a prompt, or drops it."""
        session = live.session
        prefill = PrefillLeg(
            leg.leg_id,
            leg.token_ids,
            len(session.request.token_ids),
            (0,),
            session.request.sampling,
            session.request.priority,
            session.rules.deadline_s,
        )
        try:
            self._scheduler.add(prefill, self._events.now_s)
        except Overloaded as error:
            self._drop(leg.leg_id, DropReason.OVERLOADED, str(error))
        except TandemError as error:
            self._drop(leg.leg_id, DropReason.TOO_LARGE, str(error))
        self.kick()

    def prefetch(self, live: LiveRequest, leg: Leg, source: WorkerKey, epoch: int) -> None:
        """Raises ProtocolError: a prefill worker fetches no KV."""
        raise ProtocolError("A prefill worker was asked to fetch KV.")

    def start_decode(self, live: LiveRequest, leg: Leg, source: WorkerKey) -> None:
        """Raises ProtocolError: a prefill worker takes no such leg."""
        raise ProtocolError("A prefill worker was given a leg to decode.")

    def cancel(self, leg_id: LegId) -> None:
        """Stops a leg: its blocks come back within one step, or at the fence when a pull is under way."""
        if self._scheduler.cancel(leg_id):
            offer = self.offers.get(leg_id)
            if offer is None:
                # Read, and not offered yet: the last stage of a pipeline still has it.
                self._scheduler.release(leg_id)
            else:
                offer.source.end(SourceInput.WITHDRAW, self._events.now_s)
                self.settle(leg_id)
        self.kick()

    def kick(self) -> None:
        """Begins a step, once all news of this instant is heard, if none is under way."""
        if not self._busy:
            self._busy = True
            self._events.at(self._events.now_s, STEP_BEGIN, self._begin_step, None)

    def settle(self, leg_id: LegId) -> None:
        """Frees the blocks of an offer whose hand-off says so, else looks again at its next deadline.

        A leg that is still being read goes on.
        """
        offer = self.offers.get(leg_id)
        if offer is None:
            return
        if not offer.source.may_free:
            if offer.source.state.terminal:
                self._events.at(offer.source.next_deadline_s, NEWS, self._offer_due, leg_id)
            return
        del self.offers[leg_id]
        committed = offer.source.reason is ReleaseReason.COMMITTED
        self._scheduler.release(leg_id, committed)
        if not committed and not self._scheduler.holds(leg_id):
            self._router.dropped(self.key, leg_id, DropReason.OFFER_EXPIRED, "The offer ended.")
        self.kick()

    def watch(self, leg_id: LegId) -> None:
        """Looks at the hand-off when its next deadline has come; unknown ones are ignored."""
        offer = self.offers.get(leg_id)
        if offer is not None:
            self._events.at(offer.source.next_deadline_s, NEWS, self._offer_due, leg_id)

    def load(self) -> ReportedLoad:
        """What its load message says."""
        backlog = self._scheduler.backlog()
        return ReportedLoad(
            waiting_prefill_tokens=backlog.tokens,
            waiting_legs=backlog.waiting_legs,
            running_sequences=backlog.running_legs,
            total_blocks=self.pool.num_blocks,
            free_blocks=self.pool.free_blocks,
            draining=self.draining,
        )

    def tell(self, leg_id: LegId) -> None:
        """The router has heard of all tokens already."""

    def introduce(self) -> None:
        """The router learns the whole prefix cache, from which the news of it go on."""
        self._router.cached(self.key, self.pool.snapshot(), whole=True)

    def die(self) -> None:
        """Nothing of this life happens any more."""
        self.alive = False

    def check_empty(self) -> None:
        """Raises ProtocolError unless every block came back."""
        self.pool.check_integrity(self._scheduler.held_blocks())
        if not self.empty or self.pool.allocated_blocks:
            raise ProtocolError(f"{self.key.worker_id} still holds {self.pool.allocated_blocks} blocks")

    def _begin_step(self, _: None) -> None:
        plan = self._scheduler.schedule(self._events.now_s) if self.alive else None
        if plan is None:
            self._busy = False
            return
        for opened in self._scheduler.take_opened():
            self._offer(opened)
        shape = StepShape(tuple([PromptPart(len(part.token_ids), part.start) for part in plan.slices]))
        took_s = self.spec.latency.stage_s(shape)
        lag_s = self.spec.latency.step_s(shape) - took_s
        for finishing in self._scheduler.finishing():
            self.offers[finishing.leg_id].last_step = (self._events.now_s, took_s + lag_s)
            self._on_grown(finishing.leg_id)
        self._used.step(self._events.now_s, took_s, total_tokens(shape.prompts), 0)
        self._events.at(self._events.now_s + took_s, STEP_END, self._step_ended, (plan, took_s, lag_s))

    def _step_ended(self, ended: tuple[StepPlan, float, float]) -> None:
        if not self.alive:
            return
        plan, took_s, lag_s = ended
        left_s = self.spec.left_s()
        if left_s > 0:
            self._used.longer(left_s)
            late = (plan, took_s + left_s, lag_s)
            self._events.at(self._events.now_s + left_s, STEP_END, self._step_ended, late)
            return
        drawn = [
            SampledToken(request.key, request.sample_index, TOKEN, None)
            for part in plan.slices
            for request in part.samples
        ]
        outcome = self._scheduler.complete(StepResult(plan.step, tuple(drawn), took_s), self._events.now_s)
        self._busy = False
        self._tell_cache()
        if lag_s > 0:
            self._events.at(self._events.now_s + lag_s, NEWS, self._tell, outcome)
        else:
            self._tell(outcome)
        self.kick()

    def _tell_cache(self) -> None:
        if self.spec.prefix_cache:
            delta = self.pool.drain_events()
            if delta.stored or delta.removed:
                self._router.cached(self.key, delta, whole=False)

    def _tell(self, outcome: PrefillOutcome) -> None:
        """First tokens go to the router, then the offers."""
        if not self.alive:
            return
        now_s = self._events.now_s
        for token in outcome.tokens:
            self._router.tokens(self.key, token.leg_id, token.output_index + 1, token.finish, None, now_s)
        for drop in outcome.dropped:
            self._router.dropped(self.key, drop.leg_id, drop.reason, drop.message)
        for grown in outcome.grown:
            offer = self.offers.get(grown.leg_id)
            if offer is not None:
                offer.grow(grown.ready_blocks, offer.ready.layers, now_s)
                self._on_grown(grown.leg_id)
        for offered in outcome.offered:
            self._offer(offered)

    def _offer(self, offered: OfferedLeg) -> None:
        """Lets the KV be pulled, as far as it is there, and tells the router."""
        leg_id, now_s = offered.leg_id, self._events.now_s
        if offered.stands:
            offer = self.offers.get(leg_id)
            if offer is not None:
                offer.whole(now_s)
                self._on_grown(leg_id)
        elif not self._scheduler.holds(leg_id):
            return
        else:
            source = SourceHandoff(HandoffKey(leg_id, offered.epoch), self._times, now_s)
            blocks = len(offered.blocks)
            layers = 0 if offered.growing else self._layers
            ready = KvReady(offered.ready_blocks, layers)
            self.offers[leg_id] = Offer(source, offered.kv_tokens, blocks, self._layers, ready)
            self._events.at(source.next_deadline_s, NEWS, self._offer_due, leg_id)
        if offered.growing:
            self._router.growing(self.key, leg_id, offered.epoch)
        else:
            self._router.offered(self.key, leg_id, offered.epoch, offered.cached_tokens)

    def _offer_due(self, leg_id: LegId) -> None:
        offer = self.offers.get(leg_id)
        if offer is None or not self.alive:
            return
        offer.source.tick(self._events.now_s)
        self.settle(leg_id)
        if leg_id in self.offers and not offer.source.state.terminal:
            self.watch(leg_id)

    def _drop(self, leg_id: LegId, reason: DropReason, message: str) -> None:
        self._events.at(self._events.now_s, NEWS, self._tell_drop, DroppedLeg(leg_id, reason, message))

    def _tell_drop(self, drop: DroppedLeg) -> None:
        if self.alive:
            self._router.dropped(self.key, drop.leg_id, drop.reason, drop.message)
