"""Pure: which worker gets a leg. A policy sees estimates of load and a hint of caches, and names one worker.

Prefix-aware scoring after Dynamo, the fall-back after SGLang's balance thresholds (see algorithms, routing).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from router.prefix_index import PrefixIndex
from router.worker_key import WorkerKey
from router.worker_load import WorkerView
from tandem.ids import BlockHash


@dataclass(frozen=True, slots=True)
class PrefillNeed:
    """What a leg asks of a prefill worker; `hashes` name its full blocks."""

    tokens: int
    hashes: Sequence[BlockHash]


@dataclass(frozen=True, slots=True)
class DecodeNeed:
    """What a leg asks of a decode worker: blocks for its KV, and sequences to decode."""

    blocks: int
    sequences: int
    hashes: Sequence[BlockHash]


class DispatchPolicy(Protocol):
    """Chooses among eligible workers; `workers` is never empty and sorted by key."""

    wants_hashes: bool
    """Whether the needs must carry hashes (they cost time to compute)."""

    def prefill(self, need: PrefillNeed, workers: Sequence[WorkerView]) -> WorkerKey:
        """The worker to read the leg's tokens."""
        ...

    def decode(self, need: DecodeNeed, workers: Sequence[WorkerView]) -> WorkerKey:
        """The worker to go on with the leg."""
        ...


class RoundRobin:
    """Each worker in turn."""

    wants_hashes = False

    def __init__(self, _index: PrefixIndex, _block_size: int) -> None:
        self._turns = {"prefill": 0, "decode": 0}

    def prefill(self, need: PrefillNeed, workers: Sequence[WorkerView]) -> WorkerKey:
        """The next in turn."""
        return self._next("prefill", workers)

    def decode(self, need: DecodeNeed, workers: Sequence[WorkerView]) -> WorkerKey:
        """The next in turn."""
        return self._next("decode", workers)

    def _next(self, role: str, workers: Sequence[WorkerView]) -> WorkerKey:
        turn = self._turns[role]
        self._turns[role] = turn + 1
        return workers[turn % len(workers)].key


class LeastLoaded:
    """Prefill: fewest outstanding tokens. Decode: smallest batch of those with room, else most room."""

    wants_hashes = False

    def __init__(self, _index: PrefixIndex, _block_size: int) -> None:
        self._turn = 0

    def prefill(self, need: PrefillNeed, workers: Sequence[WorkerView]) -> WorkerKey:
        """Equally loaded workers take turns."""
        return min(self._rotated(workers), key=lambda worker: worker.prefill_tokens).key

    def decode(self, need: DecodeNeed, workers: Sequence[WorkerView]) -> WorkerKey:
        """Equally loaded workers take turns."""
        roomy = [worker for worker in workers if worker.free_blocks >= need.blocks]
        if roomy:
            return min(self._rotated(roomy), key=lambda worker: (worker.batch, -worker.free_blocks)).key
        return max(workers, key=lambda worker: worker.free_blocks).key

    def _rotated(self, workers: Sequence[WorkerView]) -> Sequence[WorkerView]:
        self._turn += 1
        at = self._turn % len(workers)
        return [*workers[at:], *workers[:at]]


class PrefixAware:
    """Prefers workers that hold the prompt's prefix, unless loads differ too much.

    Score in blocks, smaller is better: prompt blocks that are not cached there, plus outstanding prompt
    tokens (prefill) or blocks in use (decode).
    """

    wants_hashes = True
    overlap_weight = 1.0
    load_weight = 1.0
    imbalance_ratio = 2.0
    imbalance_tokens = 4096
    imbalance_batch = 8

    def __init__(self, index: PrefixIndex, block_size: int) -> None:
        self._index = index
        self._block_size = block_size
        self._least_loaded = LeastLoaded(index, block_size)

    def prefill(self, need: PrefillNeed, workers: Sequence[WorkerView]) -> WorkerKey:
        """Smallest score; least loaded when outstanding tokens differ widely or nobody holds the prefix."""
        loads = [worker.prefill_tokens for worker in workers]
        overlaps = {worker.key: self._index.overlap(worker.key, need.hashes) for worker in workers}
        if not any(overlaps.values()) or self._unequal(loads, self.imbalance_tokens):
            return self._least_loaded.prefill(need, workers)
        blocks = -(-need.tokens // self._block_size)

        def score(worker: WorkerView) -> float:
            missing = blocks - overlaps[worker.key]
            return self.overlap_weight * missing + self.load_weight * worker.prefill_tokens / self._block_size

        return min(workers, key=score).key

    def decode(self, need: DecodeNeed, workers: Sequence[WorkerView]) -> WorkerKey:
        """Among workers with room: smallest score; least loaded when batches differ widely."""
        roomy = [worker for worker in workers if worker.free_blocks >= need.blocks]
        overlaps = {worker.key: self._index.overlap(worker.key, need.hashes) for worker in roomy}
        batches = [worker.batch for worker in roomy]
        if not any(overlaps.values()) or self._unequal(batches, self.imbalance_batch):
            return self._least_loaded.decode(need, workers)

        def score(worker: WorkerView) -> float:
            missing = need.blocks - overlaps[worker.key]
            used = worker.total_blocks - worker.free_blocks
            return self.overlap_weight * missing + self.load_weight * used

        return min(roomy, key=score).key

    def _unequal(self, loads: Sequence[int], threshold: int) -> bool:
        most, least = max(loads), min(loads)
        return most - least > threshold and most > self.imbalance_ratio * least


POLICIES: Mapping[str, Callable[[PrefixIndex, int], DispatchPolicy]] = MappingProxyType(
    {"round_robin": RoundRobin, "least_loaded": LeastLoaded, "prefix_aware": PrefixAware}
)
"""By the name in cluster.yaml."""


def without_avoided(workers: Sequence[WorkerView], avoid: frozenset[WorkerKey]) -> Sequence[WorkerView]:
    """The workers that did not fail the leg before; all of them when there is no other."""
    others = [worker for worker in workers if worker.key not in avoid]
    return others or workers
