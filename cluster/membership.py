"""Edge: the router's membership, and the workers' leases, kept over the registry."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import structlog

from cluster.membership_view import MembershipView
from cluster.outage import Outage
from cluster.store import RegisteredWorker, Store
from tandem.errors import TandemError
from tandem.worker import Role, WorkerRecord

log = structlog.get_logger(__name__)

POLL_S = 0.25
"""How often the registry is asked; with the lease it bounds how late a death is noticed."""

RENEWALS_PER_LEASE = 5
GRACE_MARGIN_S = 1.0


class StoreMembership:
    """Watches the registry; satisfies router.membership.Membership."""

    def __init__(self, store: Store, lease_s: float) -> None:
        self._store = store
        self._lease_s = lease_s
        self._desired: dict[Role, int] = {}

    def desired(self) -> Mapping[Role, int]:
        """How many workers of each role are wanted, as last seen; empty when nobody said."""
        return self._desired

    async def watch(self) -> AsyncGenerator[tuple[WorkerRecord, ...], None]:
        """Yields all living workers, first at once and then after every change.

        While the registry cannot be reached it yields nothing; after it came back nobody is dropped for one
        lease and a margin, so that the workers can write themselves back.
        """
        view = MembershipView(self._lease_s + GRACE_MARGIN_S)
        outage = Outage("membership is frozen: the registry is away")
        while True:
            try:
                living = await self._store.living()
            except TandemError as error:
                view.unreachable()
                outage.began(error)
            else:
                outage.ended()
                if living.desired is not None:
                    wanted = living.desired.placement
                    self._desired = {Role.PREFILL: wanted.prefill, Role.DECODE: wanted.decode}
                records = [worker.record for worker in living.workers]
                snapshot = view.observed(time.monotonic(), living.epoch, records)
                if snapshot is not None:
                    yield snapshot
            await asyncio.sleep(POLL_S)


class Superseded(TandemError):
    """A newer life of this worker has begun; this one must end."""


async def keep_registered(store: Store, worker: RegisteredWorker, lease_s: float) -> None:
    """Takes the lease and renews it for ever, through outages of the registry. Raises Superseded."""
    outage = Outage("lease not renewed: the registry is away")
    while True:
        try:
            held = await store.register(worker, lease_s)
        except TandemError as error:
            outage.began(error)
        else:
            outage.ended()
            if not held:
                raise Superseded(f"A newer life of {worker.record.worker_id} has begun.")
        await asyncio.sleep(lease_s / RENEWALS_PER_LEASE)


@asynccontextmanager
async def registered(
    store: Store, worker: RegisteredWorker, lease_s: float
) -> AsyncIterator["asyncio.Task[None]"]:
    """Holds the lease until the block ends, then gives it back; the task ends early only by Superseded."""
    task = asyncio.create_task(keep_registered(store, worker, lease_s))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with contextlib.suppress(TandemError):
            # Without this the lease runs out by itself.
            await store.deregister(worker.record)
