"""Edge: one link to each living worker of our digest, kept in step with the membership."""

import asyncio
from collections.abc import Mapping

import structlog

from router.membership import Membership
from router.worker_client import LinkListener, WorkerLink
from router.worker_key import WorkerKey
from tandem.v1 import worker_pb2 as wpb
from tandem.worker import Role, WorkerRecord

log = structlog.get_logger(__name__)

WATCH_RETRY_S = 0.5


class Fleet:
    """Owns the links. A new incarnation is a new link; the old one's worker is lost at once."""

    def __init__(
        self, membership: Membership, hello: wpb.RouterHello, token: str | None, silence_s: float
    ) -> None:
        self._membership = membership
        self._hello = hello
        self._token = token
        self._silence_s = silence_s
        self._links: dict[WorkerKey, WorkerLink] = {}
        self._tasks: dict[WorkerKey, asyncio.Task[None]] = {}
        self._records: tuple[WorkerRecord, ...] = ()
        self._refused: set[WorkerKey] = set()

    @property
    def records(self) -> tuple[WorkerRecord, ...]:
        """All workers of the last membership snapshot, also those of another digest."""
        return self._records

    def desired(self) -> Mapping[Role, int]:
        """How many workers of each role are wanted; empty when nobody said."""
        return self._membership.desired()

    @property
    def links(self) -> Mapping[WorkerKey, WorkerLink]:
        """The links by worker."""
        return self._links

    def send(self, key: WorkerKey, message: wpb.RouterMessage) -> None:
        """Queues a message for a worker; dropped when it is not attached."""
        link = self._links.get(key)
        if link is not None:
            link.send(message)

    async def run(self, listener: LinkListener) -> None:
        """Follows the membership until cancelled; serving goes on with the last snapshot when it fails."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    async for records in self._membership.watch():
                        self._follow(records, listener, tasks)
                    await asyncio.Event().wait()
                except Exception:
                    log.exception("membership cannot be watched; the last snapshot stays")
                    await asyncio.sleep(WATCH_RETRY_S)

    def _follow(
        self, records: tuple[WorkerRecord, ...], listener: LinkListener, tasks: asyncio.TaskGroup
    ) -> None:
        self._records = records
        wanted = self._latest_of_our_digest(records)
        for key in [key for key in self._links if key not in wanted]:
            self._links.pop(key).detach("The worker left the membership.")
            self._tasks.pop(key).cancel()
        for key, record in wanted.items():
            if key not in self._links:
                link = WorkerLink(record, self._hello, self._token, self._silence_s, listener)
                self._links[key] = link
                self._tasks[key] = tasks.create_task(link.run())

    def _latest_of_our_digest(self, records: tuple[WorkerRecord, ...]) -> dict[WorkerKey, WorkerRecord]:
        latest: dict[str, WorkerRecord] = {}
        for record in records:
            known = latest.get(record.worker_id)
            if known is None or known.incarnation < record.incarnation:
                latest[record.worker_id] = record
        wanted: dict[WorkerKey, WorkerRecord] = {}
        for record in latest.values():
            key = WorkerKey(record.worker_id, record.incarnation)
            if record.digest == self._hello.digest:
                wanted[key] = record
            elif key not in self._refused:
                self._refused.add(key)
                log.warning(
                    "worker has another compatibility digest and is not used",
                    worker_id=record.worker_id,
                    theirs=record.digest,
                    ours=self._hello.digest,
                )
        return wanted
