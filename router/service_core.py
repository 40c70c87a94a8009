"""Edge: the heart of the router, used by both front doors: takes requests in, gives their updates out."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable

import structlog

from engine.models.tokenizer import Tokenizer
from router.admission import Admission
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.ended_request import EndedRequest
from router.fleet import Fleet
from router.leg import State
from router.live import LiveRequest
from router.load_totals import LoadTotals
from router.membership import Membership
from router.metrics import RouterGauges, RouterMetrics
from router.pacing import Pacer
from router.readiness import Readiness, Verdict
from router.request import GenerationRequest, GenerationUpdate
from router.request_log import NoteEnd, ignore_end
from router.role_counts import RoleCount, role_counts
from router.session import Session, SessionRules
from router.slo_accounting import SloAccounting
from router.text_stream import TextStream
from tandem.errors import Cancelled, DeadlineExceeded, DuplicateRequest, NotReady, TandemError
from tandem.ids import LegId, RequestId
from tandem.slo import Stage
from tandem.v1 import worker_pb2 as wpb
from tandem.wire import sampling_to_wire
from tandem.worker import Role

log = structlog.get_logger(__name__)

TICK_S = 0.05


class RouterCore:
    """Owns the requests that are being served. All methods run on one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        tokenizer: Tokenizer,
        membership: Membership,
        token: str | None,
        clock: Callable[[], float] = time.monotonic,
        note_end: NoteEnd = ignore_end,
    ) -> None:
        self.config = config
        self.clock = clock
        self.metrics = RouterMetrics()
        self.admission = Admission(config.max_queued, config.max_active)
        self.accounting = SloAccounting(config.slo_classes, clock())
        self.totals = LoadTotals()
        self.pacer = Pacer()
        self.readiness = Readiness(config.canary_interval_s)
        self.router_id = uuid.uuid4().hex[:12]
        hello = wpb.RouterHello(router_id=self.router_id, digest=config.digest)
        self.fleet = Fleet(membership, hello, token, config.worker_silence_s)
        self.dispatcher = Dispatcher(
            config, self.fleet, self.admission, self.readiness, self.metrics, self.pacer, clock
        )
        self.metrics.watch(self.gauges)
        self._tokenizer = tokenizer
        self._note_end = note_end
        self._slo = {slo.name: slo for slo in config.slo_classes}
        self._live: dict[RequestId, LiveRequest] = {}
        self._legs_made = 0
        self._draining = False
        self._emptied = asyncio.Event()
        self._without_since_s = {Role.PREFILL: clock(), Role.DECODE: clock()}

    async def run(self) -> None:
        """Follows the workers and keeps time until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.fleet.run(self.dispatcher))
            tasks.create_task(self._tick_for_ever())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationUpdate]:
        """The request's updates until its last token; several tokens come in one when the reader is slow.

        Closing the iterator early cancels the request at all workers. Raises Overloaded, NotReady,
        DuplicateRequest, DeadlineExceeded or Cancelled.
        """
        live = self._open(request)
        session = live.session
        try:
            while True:
                live.news.clear()
                update = session.take_update(self.clock())
                if update is not None:
                    if update.timeline is not None:
                        self._close(live)
                    yield update
                elif session.ended:
                    break
                else:
                    await live.news.wait()
            if session.error is not None:
                raise session.error
            if session.state is State.CANCELLED:
                raise Cancelled("The request was cancelled, or taken over by a resumed stream.")
        finally:
            self._close(live)

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken."""
        return self._draining

    def verdict(self) -> Verdict:
        """Whether requests can be served now."""
        loads = tuple(self.dispatcher.placement.loads.values())
        return self.readiness.verdict(loads, self._draining, self.clock())

    def gauges(self) -> RouterGauges:
        """The numbers of now."""
        return RouterGauges(
            queued=self.admission.queued,
            active=self.admission.active,
            ready=self.verdict().ready,
            loads=tuple(sorted(self.dispatcher.snapshots.items(), key=lambda item: item[0])),
            goodput=self.accounting.figures(self.clock()),
            roles=self.roles(),
        )

    def roles(self) -> tuple[RoleCount, ...]:
        """Workers wanted and workers there, by role."""
        return role_counts(self.fleet.desired(), self.dispatcher.placement.loads.values())

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests, waits (bounded) for the running ones, cancels the rest."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self._live:
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            log.warning("drain timed out", requests_left=len(self._live))
        for live in list(self._live.values()):
            self._fail(live, NotReady("The router shuts down."))

    def _open(self, request: GenerationRequest) -> LiveRequest:
        """Takes a request in. Raises Overloaded, NotReady or DuplicateRequest, with nothing left behind."""
        self._refuse_duplicate(request)
        if not request.internal:
            self.accounting.offered(request.slo_class)
            self.totals.came()
        try:
            if self._draining:
                raise NotReady("The router shuts down and takes no more requests.")
            if not request.internal:
                self.admission.enter(self.clock())
            # Only now: a resume that is refused must not end the stream that runs.
            self._take_over(request)
        except TandemError as error:
            self._count_refused(request, error)
            raise
        session = Session(request, self._rules(request))
        live = LiveRequest(session, sampling_to_wire(request.sampling), asyncio.Event())
        self._live[request.request_id] = live
        left_s = session.rules.deadline_s - self.clock()
        live.deadline = asyncio.get_running_loop().call_later(max(0.0, left_s), self._deadline_passed, live)
        self.dispatcher.carry_out(live, session.admit(self.clock()))
        return live

    def _rules(self, request: GenerationRequest) -> SessionRules:
        config, params = self.config, request.sampling
        timeout_s = config.request_timeout_s if request.timeout_s is None else request.timeout_s
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= frozenset(self._tokenizer.eos_ids)

        def new_text() -> TextStream:
            detokenizer = self._tokenizer.detokenizer()
            return TextStream(detokenizer, params.stop, params.min_tokens, params.include_stop)

        return SessionRules(
            slo=self._slo[request.slo_class],
            deadline_s=request.arrived_s + timeout_s,
            max_replacements=config.max_replacements,
            end_ids=ends,
            new_leg_id=self._new_leg_id,
            new_text=new_text,
            note_gap=self._ignore_gap if request.internal else self.metrics.gaps.observe,
        )

    def _refuse_duplicate(self, request: GenerationRequest) -> None:
        if request.request_id in self._live and not request.resume:
            raise DuplicateRequest(f"A request with the id {request.request_id} is running.")

    def _take_over(self, request: GenerationRequest) -> None:
        running = self._live.get(request.request_id)
        if running is not None:
            self.dispatcher.carry_out(running, running.session.cancel())
            self._close(running)

    def _close(self, live: LiveRequest) -> None:
        """The request is over, by whatever cause: its legs stop and it leaves all books. Idempotent."""
        request = live.session.request
        if self._live.get(request.request_id) is not live:
            return
        del self._live[request.request_id]
        if live.deadline is not None:
            live.deadline.cancel()
        self.dispatcher.carry_out(live, live.session.cancel())
        if not request.internal:
            self.admission.ended(live.started, self.clock())
            self._account(live.session)
        self.dispatcher.pump()
        self._emptied.set()

    def _account(self, session: Session) -> None:
        """Counts how the request ended, and whether it was good."""
        request, slo, now_s = session.request, session.rules.slo, self.clock()
        report = session.timeline.report(slo, now_s)
        missed_by = report.slo_missed_by
        if session.state is State.FAILED and not missed_by:
            missed_by = session.timeline.reached.value
        if missed_by:
            self.metrics.slo_missed.labels(slo.name, missed_by).inc()
        else:
            self.accounting.good(slo.name, now_s)
        outcome = "finished" if session.state is State.FINISHED else "Cancelled"
        if session.error is not None:
            outcome = type(session.error).__name__
        self.metrics.requests.labels(slo.name, outcome).inc()
        usage = session.usage()
        self.totals.left(usage.prompt_tokens, usage.completion_tokens, not missed_by)
        self.metrics.observe_ended(usage, report)
        tokens = (usage.prompt_tokens, usage.completion_tokens)
        times_s = (report.ttft_s, report.tpot_s)
        self._note_end(EndedRequest(request.arrived_s, *tokens, slo.name, outcome, *times_s))
        log.info(
            "request ended",
            request_id=request.request_id,
            outcome=outcome,
            error=None if session.error is None else str(session.error),
            slo_class=slo.name,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            ttft_s=round(report.ttft_s, 4),
            tpot_s=round(report.tpot_s, 4),
            replacements=report.replacements,
            slo_missed_by=missed_by or None,
        )

    def _count_refused(self, request: GenerationRequest, error: TandemError) -> None:
        """A request that was offered and not taken in: no stage but the queue can be blamed."""
        if not request.internal:
            outcome = type(error).__name__
            self.metrics.requests.labels(request.slo_class, outcome).inc()
            self.metrics.slo_missed.labels(request.slo_class, Stage.QUEUE.value).inc()
            prompt_tokens = len(request.token_ids)
            self.totals.left(prompt_tokens, 0, good=False)
            self._note_end(EndedRequest(request.arrived_s, prompt_tokens, 0, request.slo_class, outcome))

    def _fail(self, live: LiveRequest, error: TandemError) -> None:
        """Ends a request at once in all books: its reader may be stuck in a write."""
        self.dispatcher.carry_out(live, live.session.fail(error))
        self._close(live)

    def _deadline_passed(self, live: LiveRequest) -> None:
        self._fail(live, DeadlineExceeded("The request's time limit passed."))

    def _new_leg_id(self) -> LegId:
        self._legs_made += 1
        return LegId(f"{self.router_id}-{self._legs_made}")

    @staticmethod
    def _ignore_gap(_gap_s: float) -> None:
        """The router's own canaries are in no metric."""

    async def _tick_for_ever(self) -> None:
        began_s, cpu_s = self.clock(), time.process_time()
        while True:
            await asyncio.sleep(TICK_S)
            now_s, cpu_now_s = self.clock(), time.process_time()
            spent_s = max(TICK_S, now_s - began_s)
            self.pacer.observe((cpu_now_s - cpu_s) / spent_s, spent_s - TICK_S)
            began_s, cpu_s = now_s, cpu_now_s
            self._fail_parked()
            self.dispatcher.pump()

    def _fail_parked(self) -> None:
        """Fails requests that have waited too long for a worker of some role to come (back)."""
        now_s = self.clock()
        placement = self.dispatcher.placement
        for role in (Role.PREFILL, Role.DECODE):
            if placement.serves(role):
                self._without_since_s[role] = now_s
                continue
            for leg in placement.waiting_for(role):
                waited_s = now_s - max(leg.since_s, self._without_since_s[role])
                live = self.dispatcher.owner(leg.leg_id)
                if live is not None and waited_s > self.config.park_requests_s:
                    self._fail(live, NotReady(f"No {role.value} worker came within {waited_s:.0f} s."))
