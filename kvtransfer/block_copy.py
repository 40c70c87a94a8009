"""Pure: copies scattered parts of blocks between two pools in native calls, each without the GIL.

Rates beside one memcpy of as many contiguous bytes: docs/measurements, `tandem bench kv`.
"""

import itertools
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtransfer.contract import BlockMemory
from kvtransfer.native_rows import Addresses, Sums, copy_and_hash_rows, copy_rows
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

CHUNK_BYTES: Final = 8 * 1024 * 1024
"""Bytes of one native call, between two looks at the lease: half a millisecond."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The bytes [offset, offset + length) of each of some blocks of a pool."""

    blocks: Sequence[BlockId]
    block_bytes: int
    offset: int
    length: int

    def begins(self, pool_bytes: int) -> Addresses:
        """Where each part begins in a pool of so many bytes, int64 [blocks].

        Raises TransferError (LENGTH) for one outside.
        """
        if self.offset < 0 or self.length <= 0 or self.offset + self.length > self.block_bytes:
            message = f"A part of {self.length} bytes at {self.offset} does not fit a block."
            raise TransferError(TransferFault.LENGTH, message)
        blocks = np.asarray(self.blocks, dtype=np.int64)
        if len(blocks) and not 0 <= blocks.min() <= blocks.max() < pool_bytes // self.block_bytes:
            message = f"Blocks {blocks.min()} to {blocks.max()} are not all in the pool."
            raise TransferError(TransferFault.LENGTH, message)
        return blocks * self.block_bytes + self.offset

    def addresses(self, pool: "Span") -> Addresses:
        """Where each part begins in memory, int64 [blocks]. Raises TransferError (LENGTH) for one outside."""
        return self.begins(pool.length) + pool.address


@dataclass(frozen=True, slots=True)
class Span:
    """Where bytes lie in memory, for as long as they are mapped; it does not keep them mapped."""

    address: int
    length: int

    @classmethod
    def of(cls, data: memoryview | mmap.mmap) -> "Span":
        """The span of a buffer."""
        seen = np.frombuffer(data, dtype=np.uint8)
        return cls(seen.ctypes.data, seen.nbytes)

    @classmethod
    def of_pool(cls, memory: BlockMemory) -> "Span":
        """All bytes of a pool in host memory."""
        return cls.of(memory.window(0, memory.num_blocks * memory.block_bytes))


def shares_of(count: int, most: int) -> list[tuple[int, int]]:
    """(first, count) of up to `most` shares of a number of blocks, as equal as can be."""
    bounds = [count * share // most for share in range(most + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(bounds) if high > low]


def copy_parts(
    reads: Addresses,
    writes: Addresses,
    length: int,
    landed: Callable[[int, int, Sums | None], None],
    hashed: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Copies the `length` bytes at each address that is read to the one that is written at its place.

    `landed(first, count, sums)` is called after about every `chunk_bytes` with the parts that are there now
    and, if `hashed`, the XXH3-64 of each; it may raise, which ends the copy.
    """
    for first, count in batches(len(reads), length, chunk_bytes):
        read, write = reads[first : first + count], writes[first : first + count]
        if hashed:
            landed(first, count, copy_and_hash_rows(read, write, length))
        else:
            copy_rows(read, write, length)
            landed(first, count, None)


def batches(count: int, each_bytes: int, most_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, count) of so many parts, at most `most_bytes` together but at least one of them."""
    step = max(most_bytes // each_bytes, 1)
    for begin in range(0, count, step):
        yield begin, min(step, count - begin)
