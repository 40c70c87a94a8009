"""Edge: brings the workers that run to those that the registry says are wanted, one step at a time."""

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from cluster.controller.reconcile import Health, Step, next_step
from cluster.outage import Outage
from cluster.ray_pools import RayPools
from cluster.store import Living, Store, StoreUnavailable
from cluster.worker_host import WorkerSpec
from planner.control.load_window import RolePlacement
from tandem.errors import NotReady
from tandem.ids import WorkerId

log = structlog.get_logger(__name__)

POLL_S = 0.5
REFUSED_PAUSE_S = 60.0
"""How long nobody asks Ray again for resources that it did not have."""

SpecsOf = Callable[[RolePlacement], Sequence[WorkerSpec]]
"""The workers of a placement; each keeps its id and role in every placement that has it."""


class Reconciler:
    """Owns which workers of the pools come and go; while the registry is away it changes nothing."""

    def __init__(
        self,
        store: Store,
        pools: RayPools,
        specs_of: SpecsOf,
        started: RolePlacement,
        *,
        interchangeable: bool,
        start_timeout_s: float,
    ) -> None:
        """`started` are the workers that run already; see `next_step` for `interchangeable`."""
        self._store = store
        self._pools = pools
        self._specs_of = specs_of
        self._wanted = started
        self._interchangeable = interchangeable
        self._start_timeout_s = start_timeout_s
        self._started_s: dict[WorkerId, float] = {}
        self._refused_s: dict[WorkerId, float] = {}
        self._outage = Outage("the placement is frozen: the registry is away")

    async def run(self) -> None:
        """Follows what is wanted until cancelled."""
        while True:
            if not await self.turn():
                await asyncio.sleep(POLL_S)

    async def turn(self) -> bool:
        """Takes one step; False when there was none to take."""
        try:
            living = await self._store.living()
            if living.desired is None:
                # The registry lost its data: what was wanted still is.
                await self._store.set_desired(self._wanted, expected_version=0)
                return False
        except StoreUnavailable as error:
            self._outage.began(error)
            return False
        self._outage.ended()
        self._wanted = living.desired.placement
        specs = {spec.config.worker_id: spec for spec in self._specs_of(self._wanted)}
        wanted = {worker_id: spec.config.role for worker_id, spec in specs.items()}
        step = next_step(
            wanted, self._pools.running, self._health(living), interchangeable=self._interchangeable
        )
        if step is None:
            return False
        await self._carry_out(step, None if step.start is None else specs[step.start])
        return True

    async def _carry_out(self, step: Step, spec: WorkerSpec | None) -> None:
        log.warning("placement changes", stop=step.stop, start=step.start)
        began_s = time.monotonic()
        try:
            if spec is None and step.stop is not None:
                await self._pools.remove(step.stop)
            elif spec is not None and step.stop is not None:
                await self._pools.replace(step.stop, spec)
            elif spec is not None:
                await self._pools.start([spec])
        except NotReady as error:
            log.warning("no room for a worker", worker_id=step.start, error=str(error))
            if step.start is not None:
                self._refused_s[step.start] = time.monotonic()
            return
        if step.start is not None:
            self._started_s[step.start] = time.monotonic()
        log.warning(
            "placement changed",
            stop=step.stop,
            start=step.start,
            took_s=round(time.monotonic() - began_s, 2),
        )

    def _health(self, living: Living) -> Health:
        now_s = time.monotonic()
        serving = {worker.record.worker_id for worker in living.workers}
        for worker_id in serving & self._started_s.keys():
            del self._started_s[worker_id]
        starting = [
            worker_id
            for worker_id, started_s in self._started_s.items()
            if worker_id in self._pools.running and now_s - started_s < self._start_timeout_s
        ]
        refused = [
            worker_id
            for worker_id, refused_s in self._refused_s.items()
            if now_s - refused_s < REFUSED_PAUSE_S
        ]
        return Health(serving, starting, refused)
