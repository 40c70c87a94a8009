"""Pure: who is a member, given what the registry showed and when it could not be asked.

A registry that was away comes back with expired leases, or empty. That says nothing of the workers, so for
one grace period (the time in which every living worker has renewed) nobody is taken for dead.
"""

from collections.abc import Iterable

from tandem.ids import WorkerId
from tandem.worker import WorkerRecord


class MembershipView:
    """Turns observations into snapshots; `grace_s` is one lease and a margin."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._members: dict[WorkerId, WorkerRecord] = {}
        self._published: tuple[WorkerRecord, ...] | None = None
        self._epoch: str | None = None
        self._away = False
        self._grace_until_s = float("-inf")

    def unreachable(self) -> None:
        """The registry could not be asked."""
        self._away = True

    def observed(
        self, now_s: float, epoch: str, living: Iterable[WorkerRecord]
    ) -> tuple[WorkerRecord, ...] | None:
        """The registry showed these; gives the new snapshot, or None when it is the last one again."""
        known_before = self._epoch is not None
        if known_before and (self._away or epoch != self._epoch):
            self._grace_until_s = now_s + self._grace_s
        self._epoch, self._away = epoch, False
        seen = {record.worker_id: record for record in living}
        if now_s < self._grace_until_s:
            seen = {**self._members, **{key: self._newer(record) for key, record in seen.items()}}
        self._members = seen
        snapshot = tuple(sorted(seen.values(), key=lambda record: record.worker_id))
        if snapshot == self._published:
            return None
        self._published = snapshot
        return snapshot

    def _newer(self, record: WorkerRecord) -> WorkerRecord:
        known = self._members.get(record.worker_id)
        return known if known is not None and known.incarnation > record.incarnation else record
