"""Pure: a whole cluster in one thread with a virtual clock: the objects that serve, driven by events.

Sessions, admission, placement, the schedulers of both workers, their block pools and both hand-off machines
are the live ones. Simulated are time (latency and transfer models, hops between router and workers) and the
tokens (each is the same). The same setup and requests give the same records, byte for byte.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import tee

from planner.simulation.colocated import ColocatedSite
from planner.simulation.decode import DecodeSite
from planner.simulation.events import NEWS, EventQueue
from planner.simulation.plain_cluster import PlainCluster, may_be_plain
from planner.simulation.plain_request import NotPlainError
from planner.simulation.prefill import PrefillSite
from planner.simulation.pull import Pulls
from planner.simulation.records import Ended, Records
from planner.simulation.router import SimulatedRouter
from planner.simulation.setup import Drive, Fault, FaultKind, Setup, SimRole, WorkerSpec, check
from planner.simulation.site import News, Site
from planner.simulation.utilisation import Utilisation
from planner.simulation.wires import FarSite, NewsWire, Wire
from planner.workloads.workload import SimRequest, prompt_ids
from router.session import Session
from router.worker_key import WorkerKey
from tandem.errors import InvalidRequest, TandemError
from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role

AnySite = PrefillSite | DecodeSite | ColocatedSite
_OTHER = {SimRole.PREFILL: SimRole.DECODE, SimRole.DECODE: SimRole.PREFILL}


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What came of it; `used` is by worker, over all its lives."""

    records: Records
    used: dict[WorkerId, Utilisation]

    @property
    def span_s(self) -> float:
        """From time 0 to the last request's end."""
        return max(self.records.times["ended_s"], default=0.0)


class Simulation:
    """One simulated cluster. Owns its sites; run it once."""

    def __init__(self, setup: Setup, requests: Iterable[SimRequest]) -> None:
        self._setup = setup
        self._requests = iter(requests)
        self._events = EventQueue()
        self._records = Records(setup.router.slo_classes, setup.allowance)
        self._shares_prompts = any(spec.prefix_cache for spec in setup.workers)
        colocated = setup.workers[0].role is SimRole.COLOCATED
        self._router = SimulatedRouter(
            self._events,
            # A colocated worker is never done with a prompt before its answer: no window is kept.
            replace(setup.router, prefill_window_tokens=sys.maxsize) if colocated else setup.router,
            setup.workers[0].block_size,
            lambda asked: prompt_ids(asked, self._shares_prompts),
            self._ended,
        )
        self._pulls = Pulls(
            self._events,
            setup.transfer,
            self._prefill_site,
            setup.transfer_attempts,
            setup.times.lease_s,
            setup.early,
        )
        self._to_router: dict[WorkerKey, Wire] = {}
        self._sites: dict[WorkerId, AnySite] = {}
        self._lives: dict[WorkerId, int] = {}
        self._specs = {spec.worker_id: spec for spec in setup.workers}
        self._roles = {spec.worker_id: spec.role for spec in setup.workers}
        self._used = {spec.worker_id: Utilisation(setup.keep_timeline) for spec in setup.workers}
        self._under_way = 0
        self._more_to_come = True
        self._reporting = False

    @property
    def now_s(self) -> float:
        """The virtual clock, for latency models that ask what else goes on."""
        return self._events.now_s

    def run(self) -> SimulationResult:
        """Runs to the end of the last request. Raises ProtocolError if a block was leaked."""
        for spec in self._setup.workers:
            self._start(spec.worker_id)
        for fault in self._setup.faults:
            self._events.at(fault.at_s, NEWS, self._strike, fault)
        self._next_arrival()
        self._events.run()
        for site in self._sites.values():
            if site.alive:
                site.check_empty()
        return SimulationResult(self._records, self._used)

    def _start(self, worker_id: WorkerId) -> None:
        """A new life of a worker, in the role it has now."""
        spec = self._specs[worker_id]
        self._lives[worker_id] = life = self._lives.get(worker_id, 0) + 1
        key = WorkerKey(worker_id, Incarnation(life))
        site, role = self._site(key, spec, self._news_of(key))
        self._sites[worker_id] = site
        self._router.attach(key, role, spec.pool_blocks, self._as_seen(site))
        if isinstance(site, PrefillSite):
            site.introduce()

    def _site(self, key: WorkerKey, spec: WorkerSpec, news: News) -> tuple[AnySite, Role]:
        setup, used = self._setup, self._used[key.worker_id]
        if self._roles[key.worker_id] is SimRole.COLOCATED:
            return ColocatedSite(key, spec, self._events, news, used), Role.MIXED
        if self._roles[key.worker_id] is SimRole.PREFILL:
            prefill = PrefillSite(
                key,
                spec,
                self._events,
                news,
                setup.times,
                setup.router.context_tokens,
                used,
                setup.early,
                self._pulls.grew,
            )
            return prefill, Role.PREFILL
        decode = DecodeSite(
            key,
            spec,
            self._events,
            news,
            self._pulls,
            setup.router.context_tokens,
            used,
            setup.drive is Drive.STEPS,
        )
        return decode, Role.DECODE

    def _news_of(self, key: WorkerKey) -> News:
        """The router as the worker sees it."""
        hops = self._setup.hops
        if not hops.to_worker_s and not hops.to_router_s:
            return self._router
        self._to_router[key] = Wire(self._events, hops.to_router_s)
        return NewsWire(self._router, self._to_router[key])

    def _as_seen(self, site: AnySite) -> Site:
        """The worker as the router sees it."""
        to_router = self._to_router.get(site.key)
        if to_router is None:
            return site
        return FarSite(site, Wire(self._events, self._setup.hops.to_worker_s), to_router)

    def _prefill_site(self, key: WorkerKey) -> PrefillSite | None:
        site = self._sites.get(key.worker_id)
        return site if isinstance(site, PrefillSite) and site.key == key and site.alive else None

    def _next_arrival(self) -> None:
        asked = None if self._records.overdrawn else next(self._requests, None)
        if asked is None:
            self._more_to_come = False
            return
        at_door_s = asked.at_s + self._setup.hops.front_door_s
        if at_door_s < self._events.now_s:
            raise InvalidRequest(f"Request {asked.number} comes before an earlier one.", "workload")
        self._events.at(at_door_s, NEWS, self._arrive, asked)

    def _arrive(self, asked: SimRequest) -> None:
        self._under_way += 1
        self._next_arrival()
        if not self._reporting:
            self._reporting = True
            self._events.at(self._next_report_s(), NEWS, self._report, None)
        self._router.arrive(asked)

    def _ended(self, asked: SimRequest, session: Session | None, error: TandemError | None) -> None:
        self._under_way -= 1
        now_s = self._events.now_s
        if session is None:
            self._records.add(asked, Ended(now_s, None, error=error))
            return
        tokens = len(session.samples[0].tokens)
        self._records.add(asked, Ended(now_s, session.timeline, tokens, session.usage_cached_tokens, error))

    def _next_report_s(self) -> float:
        interval_s = self._setup.router.load_interval_s
        return (self._events.now_s // interval_s + 1) * interval_s

    def _report(self, _: None) -> None:
        """All workers tell their load, as long as there is something to do."""
        for site in self._sites.values():
            if site.alive:
                self._router.reported(site.key, site.load())
        if self._under_way:
            self._events.at(self._next_report_s(), NEWS, self._report, None)
        else:
            self._reporting = False

    def _strike(self, fault: Fault) -> None:
        site = self._sites[fault.worker_id]
        if fault.kind is FaultKind.TRANSFER:
            self._pulls.fail_one(fault.worker_id)
        elif fault.kind is FaultKind.REVIVAL:
            if not site.alive:
                self._start(fault.worker_id)
        elif site.alive:
            if fault.kind is FaultKind.DEATH:
                self._die(site)
            elif not isinstance(site, ColocatedSite):
                site.draining = True
                self._router.reported(site.key, site.load())
                self._flip_when_empty(site)

    def _die(self, site: AnySite) -> None:
        site.die()
        if site.key in self._to_router:
            self._to_router.pop(site.key).flush()
        self._router.lost(site.key)
        if isinstance(site, PrefillSite):
            self._pulls.source_died(site.key)
        elif isinstance(site, DecodeSite):
            self._pulls.sink_died(site.key)

    def _flip_when_empty(self, site: AnySite) -> None:
        """A drained worker leaves, and comes back in its other role."""
        if not site.alive or self._sites[site.key.worker_id] is not site:
            return
        if not site.empty:
            self._events.at(self._events.now_s + self._setup.flip_s, NEWS, self._flip_when_empty, site)
            return
        worker_id = site.key.worker_id
        site.check_empty()
        self._die(site)
        self._roles[worker_id] = _OTHER[self._roles[worker_id]]
        self._events.at(self._events.now_s + self._setup.flip_s, NEWS, self._come_back, worker_id)

    def _come_back(self, worker_id: WorkerId) -> None:
        if not self._sites[worker_id].alive:
            self._start(worker_id)


def simulate(setup: Setup, requests: Iterable[SimRequest]) -> SimulationResult:
    """What becomes of the requests, which come in order of arrival.

    Counts the plain course (simulation/plain_cluster.py) as long as it is one, else drives the full objects.
    Raises InvalidRequest for what can't be simulated.
    """
    check(setup)
    if not may_be_plain(setup):
        return Simulation(setup, requests).run()
    asked, again = tee(requests)
    plain = PlainCluster(setup, asked)
    try:
        plain.run()
    except NotPlainError:
        return Simulation(setup, again).run()
    return SimulationResult(plain.records, plain.used)
