"""Pure: the simulated router: the live session, placement and admission objects, driven by events."""

from collections import deque
from collections.abc import Callable, Sequence

from decode_worker.grown_tokens import TOKEN
from engine.kv.blocks import CacheDelta
from engine.leg import DropReason
from planner.simulation.events import NEWS, EventQueue
from planner.simulation.setup import RouterRules
from planner.simulation.site import LiveRequest, Site
from planner.workloads.workload import SimRequest
from router.admission import Admission, fit_context
from router.commands import Cancel, Command, PlaceDecode, PlacePrefetch, SendDecode
from router.placement import Placement, WaitingLeg, Windows
from router.request import GenerationRequest
from router.session import Session, SessionRules
from router.timeline import Pace
from router.worker_key import WorkerKey
from router.worker_load import ReportedLoad, WorkerLoad
from tandem.errors import DeadlineExceeded, NotReady, ProtocolError, TandemError
from tandem.ids import LegId, RequestId
from tandem.sampling import FinishReason, SamplingParams
from tandem.worker import Role

_PARAMS_KEPT = 4096


Ended = Callable[[SimRequest, Session | None, TandemError | None], None]
"""Told how a request ended; a refused one has no session."""


class SimulatedRouter:
    """Owns the requests under way. Does what router/dispatcher.py and service_core.py do, without I/O."""

    def __init__(
        self,
        events: EventQueue,
        rules: RouterRules,
        block_size: int,
        prompt_ids: Callable[[SimRequest], Sequence[int]],
        ended: Ended,
    ) -> None:
        self.placement = Placement(
            rules.dispatch, block_size, Windows(rules.prefill_window_tokens, rules.decode_window_legs)
        )
        self.admission = Admission(rules.max_queued, rules.max_active)
        self.sites: dict[WorkerKey, Site] = {}
        self._events = events
        self._rules = rules
        self._prompt_ids = prompt_ids
        self._ended = ended
        self._classes = {slo.name: slo for slo in rules.slo_classes}
        self._by_leg: dict[LegId, LiveRequest] = {}
        self._deadlines: deque[LiveRequest] = deque()
        self._deadline_armed = False
        self._params: dict[int, SamplingParams] = {}
        self._legs_made = 0
        self._unserved = True
        self._without_since_s = {Role.PREFILL: 0.0, Role.DECODE: 0.0}

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return not self._by_leg

    def live(self, leg_id: LegId) -> LiveRequest | None:
        """The request of a leg; None when the leg is over."""
        return self._by_leg.get(leg_id)

    def cached(self, key: WorkerKey, news: CacheDelta, whole: bool) -> None:
        """A worker's prefix cache changed, or this is all of it. Raises ProtocolError if news are missing."""
        index = self.placement.index
        if index.apply(key, news.first_event, news.stored, news.removed, whole):
            raise ProtocolError(f"News of the prefix cache of {key.worker_id} are missing.")

    def arrive(self, asked: SimRequest) -> None:
        """A request came: it is admitted or refused."""
        now_s = self._events.now_s
        try:
            params = fit_context(
                asked.prompt_tokens, self._sampling(asked.output_tokens), self._rules.context_tokens
            )
            self.admission.enter(now_s)
        except TandemError as error:
            self._ended(asked, None, error)
            return
        request = GenerationRequest(
            RequestId(str(asked.number)), self._prompt_ids(asked), params, asked.slo_class, asked.at_s
        )
        live = LiveRequest(asked, Session(request, self._session_rules(request)))
        if not self._deadline_armed:
            self._deadline_armed = True
            self._events.at(live.session.rules.deadline_s, NEWS, self._deadline_passed, None)
        self._deadlines.append(live)
        self.carry_out(live, live.session.admit(now_s))

    def tokens(
        self,
        key: WorkerKey,
        leg_id: LegId,
        upto: int,
        finish: FinishReason | None,
        pace: Pace | None,
        last_s: float,
    ) -> None:
        """A worker has written the output of a leg up to index `upto` (exclusive), the last of it then."""
        live = self._by_leg.get(leg_id)
        if live is None:
            return
        known = len(live.session.samples[0].tokens)
        fresh = (TOKEN,) * (upto - known)
        commands = live.session.tokens(key, leg_id, 0, known, fresh, (), finish, None, last_s, pace)
        if commands or finish is not None:
            self.carry_out(live, commands)

    def growing(self, key: WorkerKey, leg_id: LegId, epoch: int) -> None:
        """A prefill worker reads the leg, and its KV can be fetched meanwhile."""
        live = self._by_leg.get(leg_id)
        if live is not None:
            self.carry_out(live, live.session.kv_growing(key, leg_id, epoch))

    def prefetch_lost(self, key: WorkerKey, leg_id: LegId) -> None:
        """A decode worker does not fetch the leg early any more."""
        live = self._by_leg.get(leg_id)
        if live is not None and live.session.prefetch_lost(key, leg_id):
            self.placement.prefetch_lost(leg_id, key)

    def offered(self, key: WorkerKey, leg_id: LegId, epoch: int, cached_tokens: int) -> None:
        """A prefill worker parks the leg's KV."""
        live = self._by_leg.get(leg_id)
        if live is not None:
            commands = live.session.kv_offered(key, leg_id, epoch, cached_tokens)
            if commands:
                self.placement.offered(leg_id, key)
                self.carry_out(live, commands)

    def landed(self, key: WorkerKey, leg_id: LegId, transport: str, moved_bytes: int) -> None:
        """A decode worker holds the leg's KV."""
        live = self._by_leg.get(leg_id)
        if live is not None and live.session.kv_landed(
            key, leg_id, transport, moved_bytes, self._events.now_s
        ):
            self.placement.landed(leg_id, key)
            self._pump_decode()

    def dropped(self, key: WorkerKey, leg_id: LegId, reason: DropReason, message: str) -> None:
        """A worker gave a leg up."""
        live = self._by_leg.get(leg_id)
        if live is not None:
            self.carry_out(live, live.session.dropped(key, leg_id, (), reason, message, self._events.now_s))

    def attach(self, key: WorkerKey, role: Role, total_blocks: int, site: Site) -> None:
        """A worker can be chosen from now on."""
        self.sites[key] = site
        self.placement.attach(WorkerLoad(key, role, total_blocks))
        self._note_service()
        self._pump()

    def lost(self, key: WorkerKey) -> None:
        """A worker is gone: its legs are placed anew."""
        self.sites.pop(key, None)
        self._note_service()
        self.placement.detach(key)
        self._note_service()
        for live in list(self._by_leg.values()):
            commands = live.session.worker_lost(key, self._events.now_s)
            if commands or live.session.ended:
                self.carry_out(live, commands)

    def reported(self, key: WorkerKey, load: ReportedLoad) -> None:
        """A worker told its load."""
        books = self.placement.loads.get(key)
        if books is not None:
            drained = load.draining and not books.reported.draining
            if drained:
                self._note_service()
            books.heard(load, self._events.now_s)
            if drained:
                self._note_service()
            self._pump()

    def carry_out(self, live: LiveRequest, commands: Sequence[Command]) -> None:
        """Does what a session's input called for."""
        session = live.session
        gone = live.leg_id
        if gone is not None and gone not in session.legs:
            live.leg_id = None
            del self._by_leg[gone]
            self.placement.forget(gone)
        for command in commands:
            if isinstance(command, Cancel):
                site = self.sites.get(command.worker)
                if site is not None:
                    site.cancel(command.leg_id)
            elif isinstance(command, PlaceDecode):
                self.placement.wait_for_decode(self._waiting(live, command.leg_id))
            elif isinstance(command, PlacePrefetch):
                self._place_prefetch(live, command.leg_id)
            elif isinstance(command, SendDecode):
                self.placement.start_prefetched(command.leg_id, command.worker)
                self._send_decode(live, command.leg_id, command.worker)
            else:
                self._place_prefill(live, command.leg_id)
        if session.ended:
            self._close(live)
        self._pump()

    def _place_prefill(self, live: LiveRequest, leg_id: LegId) -> None:
        leg = live.session.legs.get(leg_id)
        if leg is None:
            return
        live.leg_id = leg.leg_id
        self._by_leg[leg.leg_id] = live
        if leg.not_before_s > self._events.now_s:
            self._events.at(leg.not_before_s, NEWS, self._end_pause, leg.leg_id)
        else:
            self._wait_for_prefill(live, leg.leg_id)

    def _end_pause(self, leg_id: LegId) -> None:
        live = self._by_leg.get(leg_id)
        if live is not None:
            self._wait_for_prefill(live, leg_id)
            self._pump()

    def _wait_for_prefill(self, live: LiveRequest, leg_id: LegId) -> None:
        self.placement.wait_for_prefill(self._waiting(live, leg_id))

    def _waiting(self, live: LiveRequest, leg_id: LegId) -> WaitingLeg:
        session = live.session
        leg = session.legs[leg_id]
        if self._unserved:
            self._events.at(self._events.now_s + self._rules.park_requests_s, NEWS, self._fail_parked, None)
        return WaitingLeg(
            leg_id,
            leg.token_ids,
            1,
            leg.avoid,
            session.request.priority,
            session.rules.deadline_s,
            self._events.now_s,
            live.started,
        )

    def _pump(self) -> None:
        """Sends waiting legs to workers as long as there is room."""
        while (placed := self.placement.next_prefill(self.admission.may_start)) is not None:
            leg_id, key = placed
            live = self._by_leg[leg_id]
            if not live.started:
                live.started = True
                self.admission.started()
            live.session.prefill_sent(leg_id, key, self._events.now_s)
            self.sites[key].start_prefill(live, live.session.legs[leg_id])
        self._pump_decode()

    def _pump_decode(self) -> None:
        while (placed := self.placement.next_decode()) is not None:
            leg_id, key = placed
            self._send_decode(self._by_leg[leg_id], leg_id, key)

    def _send_decode(self, live: LiveRequest, leg_id: LegId, key: WorkerKey) -> None:
        live.session.decode_sent(leg_id, key)
        leg = live.session.legs[leg_id]
        if leg.prefill is not None:
            self.sites[key].start_decode(live, leg, leg.prefill)

    def _place_prefetch(self, live: LiveRequest, leg_id: LegId) -> None:
        """Lets a decode worker with room fetch the KV early; else the leg is placed once it is read."""
        key = self.placement.place_prefetch(self._waiting(live, leg_id))
        leg = live.session.legs[leg_id]
        if key is not None and leg.prefill is not None:
            live.session.prefetch_sent(leg_id, key)
            self.sites[key].prefetch(live, leg, leg.prefill, leg.epoch)

    def _close(self, live: LiveRequest) -> None:
        self.admission.ended(live.started, self._events.now_s)
        self._forget_ended()
        self._ended(live.asked, live.session, live.session.error)

    def _deadline_passed(self, _: None) -> None:
        """Fails the requests whose time is up; the rest, in order of their deadlines, wait for theirs."""
        self._forget_ended()
        self._deadline_armed = False
        while self._deadlines:
            live = self._deadlines[0]
            if live.session.rules.deadline_s > self._events.now_s:
                self._deadline_armed = True
                self._events.at(live.session.rules.deadline_s, NEWS, self._deadline_passed, None)
                return
            self._hear_all(live)
            if not live.session.ended:
                error = DeadlineExceeded("The request's time limit passed.")
                self.carry_out(live, live.session.fail(error))
            self._forget_ended()

    def _hear_all(self, live: LiveRequest) -> None:
        """Its worker tells what it has written by now."""
        leg = None if live.leg_id is None else live.session.legs[live.leg_id]
        for key in () if leg is None else leg.workers():
            site = self.sites.get(key)
            if site is not None and leg is not None:
                site.tell(leg.leg_id)

    def _forget_ended(self) -> None:
        while self._deadlines and self._deadlines[0].session.ended:
            self._deadlines.popleft()

    def _note_service(self) -> None:
        """Remembers since when no worker plays a role; called before and after that can change."""
        served = {role: self.placement.serves(role) for role in self._without_since_s}
        self._unserved = not all(served.values())
        for role, is_served in served.items():
            if is_served:
                self._without_since_s[role] = self._events.now_s

    def _fail_parked(self, _: None) -> None:
        """Fails requests that have waited too long for a worker of some role to come back."""
        now_s = self._events.now_s
        for role in (Role.PREFILL, Role.DECODE):
            if self.placement.serves(role):
                continue
            for leg in self.placement.waiting_for(role):
                live = self._by_leg.get(leg.leg_id)
                waited_s = now_s - max(leg.since_s, self._without_since_s[role])
                if live is not None and waited_s >= self._rules.park_requests_s:
                    error = NotReady(f"No {role.value} worker came within {waited_s:.0f} s.")
                    self.carry_out(live, live.session.fail(error))

    def _session_rules(self, request: GenerationRequest) -> SessionRules:
        return SessionRules(
            slo=self._classes[request.slo_class],
            deadline_s=request.arrived_s + self._rules.request_timeout_s,
            max_replacements=self._rules.max_replacements,
            end_ids=frozenset(),
            new_leg_id=self._new_leg_id,
            new_text=_no_text,
            note_gap=_ignore_gap,
        )

    def _new_leg_id(self) -> LegId:
        self._legs_made += 1
        return LegId(str(self._legs_made))

    def _sampling(self, output_tokens: int) -> SamplingParams:
        params = self._params.get(output_tokens)
        if params is None:
            params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
            if len(self._params) < _PARAMS_KEPT:
                self._params[output_tokens] = params
        return params


def _no_text() -> None:
    """Nobody reads what is simulated."""


def _ignore_gap(_gap_s: float) -> None:
    """Gaps are in the timeline."""
