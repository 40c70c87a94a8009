"""Pure: the plain course of a simulation, counted: no faults, no prefix cache, nobody preempted or expired.

Driven through: admission, dispatch policies, the router's books on workers, timelines. Counted in bulk:
sessions and hand-offs (on the plain course each walks one fixed way) and blocks (whose names don't matter).
Whatever leaves the course raises NotPlainError, and planner/simulator.py drives the full objects instead;
tests/planner/test_simulator.py holds both to the same records, byte for byte.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from planner.simulation.events import NEWS, EventQueue
from planner.simulation.plain_decode import PlainDecode
from planner.simulation.plain_prefill import PlainPrefill
from planner.simulation.plain_request import NotPlainError, PlainRequest
from planner.simulation.records import Ended, Records
from planner.simulation.setup import Drive, Setup, SimRole
from planner.simulation.utilisation import Utilisation
from planner.workloads.workload import SimRequest
from router.admission import Admission, fit_context
from router.dispatch import POLICIES, DecodeNeed, DispatchPolicy, PrefillNeed
from router.placement import Windows, decode_blocks
from router.prefix_index import PrefixIndex
from router.timeline import Pace, SampleTimes, Timeline
from router.worker_key import WorkerKey
from router.worker_load import WorkerLoad
from tandem.errors import ConfigError, InvalidRequest, TandemError
from tandem.ids import Incarnation, LegId
from tandem.sampling import SamplingParams
from tandem.worker import Role


def may_be_plain(setup: Setup) -> bool:
    """Whether counting can follow the setup at all."""
    roles = {spec.role for spec in setup.workers}
    cached = any(spec.prefix_cache for spec in setup.workers)
    disaggregated = roles == {SimRole.PREFILL, SimRole.DECODE}
    whole = setup.early is None
    return disaggregated and whole and setup.drive is Drive.AUTO and not (cached or setup.faults)


class PlainCluster:
    """One simulated cluster on the plain course; run it once."""

    def __init__(self, setup: Setup, requests: Iterable[SimRequest]) -> None:
        if setup.router.dispatch not in POLICIES:
            raise ConfigError(f"dispatch must be one of {', '.join(sorted(POLICIES))}.")
        self._rules = setup.router
        self._windows = Windows(setup.router.prefill_window_tokens, setup.router.decode_window_legs)
        self._times = setup.times
        self._transfer = setup.transfer
        self._hops = setup.hops
        self._far = bool(setup.hops.to_worker_s or setup.hops.to_router_s)
        self._requests = iter(requests)
        self._events = EventQueue()
        self.records = Records(setup.router.slo_classes, setup.allowance)
        self.used = {spec.worker_id: Utilisation(setup.keep_timeline) for spec in setup.workers}
        block_size = setup.workers[0].block_size
        self._block_size = block_size
        self._policy: DispatchPolicy = POLICIES[setup.router.dispatch](PrefixIndex(), block_size)
        self._admission = Admission(setup.router.max_queued, setup.router.max_active)
        self._sites: list[PlainPrefill | PlainDecode] = [
            self._site(setup, at) for at in range(len(setup.workers))
        ]
        by_key = sorted(self._sites, key=lambda site: site.load.key)
        self._prefills = {site.load.key: site for site in by_key if isinstance(site, PlainPrefill)}
        self._decodes = {site.load.key: site for site in by_key if isinstance(site, PlainDecode)}
        self._waiting: deque[PlainRequest] = deque()
        self._offered: list[tuple[float, int, PlainRequest]] = []
        self._offers = 0
        self._parked_at: dict[LegId, PlainPrefill] = {}
        self._made = 0
        self._under_way = 0
        self._reporting = False

    def run(self) -> None:
        """Runs to the end of the last request. Raises NotPlainError when it leaves the plain course."""
        self._next_arrival()
        self._events.run()

    def _site(self, setup: Setup, at: int) -> PlainPrefill | PlainDecode:
        spec = setup.workers[at]
        used = self.used[spec.worker_id]
        role = Role.PREFILL if spec.role is SimRole.PREFILL else Role.DECODE
        load = WorkerLoad(WorkerKey(spec.worker_id, Incarnation(1)), role, spec.pool_blocks)
        if role is Role.PREFILL:
            return PlainPrefill(spec, load, self._events, used, self._prompts_read)
        return PlainDecode(spec, load, self._events, used, self._pull, self._written)

    def _next_arrival(self) -> None:
        asked = None if self.records.overdrawn else next(self._requests, None)
        if asked is None:
            return
        at_door_s = asked.at_s + self._hops.front_door_s
        if at_door_s < self._events.now_s:
            raise InvalidRequest(f"Request {asked.number} comes before an earlier one.", "workload")
        self._events.at(at_door_s, NEWS, self._arrive, asked)

    def _arrive(self, asked: SimRequest) -> None:
        self._next_arrival()
        if not self._reporting:
            self._reporting = True
            self._events.at(self._next_report_s(), NEWS, self._report, None)
        now_s = self._events.now_s
        try:
            if asked.prompt_tokens + asked.output_tokens > self._rules.context_tokens:
                params = SamplingParams(max_tokens=asked.output_tokens)
                fit_context(asked.prompt_tokens, params, self._rules.context_tokens)
            self._admission.enter(now_s)
        except TandemError as error:
            self.records.add(asked, Ended(now_s, None, error=error))
            return
        self._under_way += 1
        self._made += 1
        timeline = Timeline(asked.at_s, [SampleTimes()])
        leg_id = LegId(str(self._made))
        deadline_s = asked.at_s + self._rules.request_timeout_s
        self._waiting.append(PlainRequest(asked, asked.prompt_tokens, leg_id, timeline, deadline_s))
        self._pump()

    def _pump(self) -> None:
        """Sends waiting requests to workers as long as there is room."""
        while self._waiting and self._admission.may_start:
            request = self._waiting[0]
            tokens = request.tokens
            let_read = self._windows.let_read
            views = [site.load.view() for site in self._prefills.values() if let_read(site.load, tokens)]
            if not views:
                break
            key = views[0].key
            if len(views) > 1:
                key = self._policy.prefill(PrefillNeed(tokens, ()), views)
            self._waiting.popleft()
            site = self._prefills[key]
            site.load.prefill_sent(request.leg_id, tokens)
            self._admission.started()
            request.timeline.prefill_sent(key.worker_id, self._events.now_s)
            self._hop(self._hops.to_worker_s, site.add, request)
        self._pump_decode()

    def _pump_decode(self) -> None:
        while self._offered:
            let_fetch = self._windows.let_fetch
            views = [site.load.view() for site in self._decodes.values() if let_fetch(site.load)]
            if not views:
                return
            request = heapq.heappop(self._offered)[2]
            blocks = decode_blocks(request.tokens, 1, self._block_size)
            key = views[0].key
            if len(views) > 1:
                key = self._policy.decode(DecodeNeed(blocks, 1, ()), views)
            site = self._decodes[key]
            site.load.decode_sent(request.leg_id, blocks, 1)
            self._hop(self._hops.to_worker_s, site.add, request)

    def _hop(self, takes_s: float, heard: Callable[[Any], None], message: Any) -> None:
        """A message between the router and a worker; at once when hops take no time."""
        if self._far:
            self._events.at(self._events.now_s + takes_s, NEWS, heard, message)
        else:
            heard(message)

    def _prompts_read(self, site: PlainPrefill, read: list[PlainRequest]) -> None:
        for request in read:
            if request.asked.output_tokens > 1:
                request.offered_s = self._events.now_s
                self._parked_at[request.leg_id] = site
        self._hop(self._hops.to_router_s, self._first_tokens, (site, read))

    def _first_tokens(self, told: tuple[PlainPrefill, list[PlainRequest]]) -> None:
        site, read = told
        now_s = self._events.now_s
        for request in read:
            request.timeline.emitted(0, 1, now_s)
            if request.asked.output_tokens == 1:
                self._close(site.load, request)
        for request in read:
            if request.asked.output_tokens > 1:
                site.load.forget(request.leg_id)
                self._offers += 1
                heapq.heappush(self._offered, (request.deadline_s, self._offers, request))
                self._pump()

    def _pull(self, puller: PlainDecode, request: PlainRequest) -> None:
        now_s = self._events.now_s
        source = self._parked_at[request.leg_id]
        same_node = puller.spec.node == source.spec.node
        took_s = self._transfer.transfer_s(request.asked.prompt_tokens, same_node)
        if took_s >= self._times.lease_s or now_s >= request.offered_s + self._times.park_s:
            raise NotPlainError
        self._events.at(now_s + took_s, NEWS, self._moved, (puller, request))

    def _moved(self, moved: tuple[PlainDecode, PlainRequest]) -> None:
        puller, request = moved
        self._parked_at.pop(request.leg_id).release(request)
        puller.landed(request)
        self._hop(self._hops.to_router_s, self._landed, (puller, request))
        puller.after_landing()

    def _landed(self, landed: tuple[PlainDecode, PlainRequest]) -> None:
        puller, request = landed
        request.timeline.landed(puller.spec.worker_id, "simulated", 0, self._events.now_s)
        puller.load.landed(request.leg_id)
        self._pump_decode()

    def _written(self, site: PlainDecode, request: PlainRequest, pace: Pace) -> None:
        if self._far:
            pace = Pace(pace.first_s + self._hops.to_router_s, pace.longest_gap_s)
        self._hop(self._hops.to_router_s, self._last_tokens, (site, request, pace))

    def _last_tokens(self, told: tuple[PlainDecode, PlainRequest, Pace]) -> None:
        site, request, pace = told
        request.timeline.emitted(0, request.asked.output_tokens - 1, self._events.now_s, pace)
        self._close(site.load, request)

    def _close(self, load: WorkerLoad, request: PlainRequest) -> None:
        now_s = self._events.now_s
        if now_s >= request.deadline_s:
            raise NotPlainError
        load.forget(request.leg_id)
        self._admission.ended(True, now_s)
        self._under_way -= 1
        self.records.add(request.asked, Ended(now_s, request.timeline, request.asked.output_tokens))
        self._pump()

    def _next_report_s(self) -> float:
        interval_s = self._rules.load_interval_s
        return (self._events.now_s // interval_s + 1) * interval_s

    def _report(self, _: None) -> None:
        """All workers tell their load, as long as there is something to do."""
        for site in self._sites:
            site.load.heard(site.report(), self._events.now_s)
            if self._waiting or self._offered:
                self._pump()
        if self._under_way:
            self._events.at(self._next_report_s(), NEWS, self._report, None)
        else:
            self._reporting = False
