"""Pure: which worker probably caches which prefix; rebuilt from workers' events, a hint and never truth."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from router.worker_key import WorkerKey
from tandem.ids import BlockHash


@dataclass(slots=True)
class _Cache:
    hashes: set[BlockHash] = field(default_factory=set)
    next_event: int | None = None
    """Number of the event that must come next; None until a snapshot came."""


class PrefixIndex:
    """Per worker, the chain hashes of the full blocks that its prefix cache holds."""

    def __init__(self) -> None:
        self._caches: dict[WorkerKey, _Cache] = {}

    def apply(
        self,
        worker: WorkerKey,
        first_event: int,
        stored: Sequence[BlockHash],
        removed: Sequence[BlockHash],
        snapshot: bool,
    ) -> bool:
        """Takes in one CacheEvents message; returns whether events are missing, so that a snapshot is needed.

        The hashes of an incremental message that follows a gap are not taken in.
        """
        cache = self._caches.setdefault(worker, _Cache())
        following = first_event + len(stored) + len(removed)
        if snapshot:
            cache.hashes = set(stored)
            cache.next_event = following
            return False
        if first_event != cache.next_event:
            return True
        cache.hashes.update(stored)
        cache.hashes.difference_update(removed)
        cache.next_event = following
        return False

    def overlap(self, worker: WorkerKey, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of a prompt, given by its chain hashes, the worker holds."""
        cache = self._caches.get(worker)
        if cache is None:
            return 0
        held = cache.hashes
        for count, block_hash in enumerate(hashes):
            if block_hash not in held:
                return count
        return len(hashes)

    def forget(self, worker: WorkerKey) -> None:
        """The worker is gone; idempotent."""
        self._caches.pop(worker, None)

    def blocks(self, worker: WorkerKey) -> int:
        """How many blocks the worker is believed to hold."""
        cache = self._caches.get(worker)
        return 0 if cache is None else len(cache.hashes)
