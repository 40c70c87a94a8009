"""Pure: copies scattered parts of blocks between two pools in a few native calls, each without the GIL.

A memmove for each block costs a call and a hand-over of the GIL apiece, so about 1 MiB at a time is gathered
into the CPU's cache and scattered from there, by two threads. Long runs are copied directly. Rates beside one
memcpy of as many contiguous bytes: docs/measurements, `tandem bench kv`.
"""

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

BATCH_BYTES: Final = 1536 * 1024
"""Bytes gathered at a time: they stay in the core's cache until they are scattered."""

DIRECT_BYTES: Final = 256 * 1024
"""Runs of at least so many bytes are copied by a memmove of their own."""

CHUNK_BYTES: Final = 32 * 1024 * 1024
"""Bytes of one memmove, between two looks at the lease: milliseconds. A large one bypasses the caches."""

SMALLEST_UNIT_BYTES: Final = 1024
"""Below this unit, moving item by item costs more than a memmove for each run."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Parts:
    """The bytes [offset, offset + length) of each of some blocks of a pool."""

    blocks: Sequence[BlockId]
    block_bytes: int
    offset: int
    length: int

    def share(self, first: int, count: int) -> "Parts":
        """The same of some of the blocks."""
        return Parts(self.blocks[first : first + count], self.block_bytes, self.offset, self.length)

    def begins(self) -> npt.NDArray[np.int64]:
        """Where each part begins in the pool, in bytes."""
        return np.asarray(self.blocks, dtype=np.int64) * self.block_bytes + self.offset

    def check(self, pool_bytes: int) -> None:
        """Raises TransferError (LENGTH) unless every part lies in a pool of this size."""
        if self.offset < 0 or self.length <= 0 or self.offset + self.length > self.block_bytes:
            message = f"A part of {self.length} bytes at {self.offset} does not fit a block."
            raise TransferError(TransferFault.LENGTH, message)
        for block in self.blocks:
            if block < 0 or (block + 1) * self.block_bytes > pool_bytes:
                raise TransferError(TransferFault.LENGTH, f"The pool has no block {block}.")


def runs_of(parts: Parts) -> list[tuple[int, int]]:
    """(begin, length) in the pool's bytes; parts that follow each other are one run."""
    if not parts.blocks:
        return []
    begins = parts.begins()
    firsts = np.flatnonzero(np.diff(begins, prepend=-1 - parts.length) != parts.length)
    counts = np.diff(firsts, append=len(begins))
    return list(zip(begins[firsts].tolist(), (counts * parts.length).tolist(), strict=True))


def shares_of(count: int, most: int) -> list[tuple[int, int]]:
    """(first, count) of up to `most` shares of a number of blocks, as equal as can be."""
    bounds = [count * share // most for share in range(most + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(bounds) if high > low]


def copy_parts(
    source: Bytes,
    given: Parts,
    target: Bytes,
    taken: Parts,
    landed: Callable[[int, int], None],
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Copies each given part into the taken part at its place; both have the same offset, length and number.

    `landed(first, count)` is called after every batch, or every `chunk_bytes` of a long run, with the blocks
    that are there now; it may raise, which ends the copy. Parts must have been checked.
    """
    bounds = _run_bounds(given, taken)
    unit = math.gcd(given.block_bytes, given.offset, given.length)
    long_runs = len(given.blocks) * given.length >= DIRECT_BYTES * (len(bounds) - 1)
    if long_runs or unit < SMALLEST_UNIT_BYTES:
        _copy_runs(source, given, target, taken, bounds.tolist(), landed, chunk_bytes)
    else:
        _copy_units(source, given, target, taken, unit, landed)


def _run_bounds(given: Parts, taken: Parts) -> npt.NDArray[np.int64]:
    """Where runs of blocks that follow each other on both sides begin, and the number of blocks."""
    breaks = (np.diff(given.begins()) != given.length) | (np.diff(taken.begins()) != given.length)
    return np.concatenate(([0], np.flatnonzero(breaks) + 1, [len(given.blocks)]))


def _copy_runs(
    source: Bytes,
    given: Parts,
    target: Bytes,
    taken: Parts,
    bounds: Sequence[int],
    landed: Callable[[int, int], None],
    chunk_bytes: int,
) -> None:
    reads, writes = given.begins() + source.ctypes.data, taken.begins() + target.ctypes.data
    for first, after in itertools.pairwise(bounds):
        for begin, number in _batches(first, after - first, given.length, chunk_bytes):
            ctypes.memmove(int(writes[begin]), int(reads[begin]), number * given.length)
            landed(begin, number)


def _copy_units(
    source: Bytes, given: Parts, target: Bytes, taken: Parts, unit: int, landed: Callable[[int, int], None]
) -> None:
    """Gathers and scatters items of `unit` bytes, which divide pools, blocks and parts."""
    item = np.dtype(f"V{unit}")
    sources = source[: source.size // unit * unit].view(item)
    targets = target[: target.size // unit * unit].view(item)
    each = np.arange(given.length // unit)
    staging: npt.NDArray[Any] = np.empty(max(BATCH_BYTES // given.length, 1) * len(each), dtype=item)
    reads, writes = given.begins() // unit, taken.begins() // unit
    for first, number in _batches(0, len(given.blocks), given.length, BATCH_BYTES):
        part = staging[: number * len(each)]
        read = (reads[first : first + number, None] + each).reshape(-1)
        # "clip" writes straight into `out`; every index was checked before.
        np.take(sources, read, out=part, mode="clip")
        np.put(targets, (writes[first : first + number, None] + each).reshape(-1), part, mode="clip")
        landed(first, number)


def _batches(first: int, count: int, each: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, count) of at most `most` bytes together, at least one of them."""
    step = max(most // each, 1)
    for begin in range(first, first + count, step):
        yield begin, min(step, first + count - begin)
