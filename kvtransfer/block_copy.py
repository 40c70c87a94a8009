"""Pure: copies scattered parts of blocks between two pools in native calls, each without the GIL.

Rates beside one memcpy of as many contiguous bytes: docs/measurements, `tandem bench kv`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtransfer.contract import BlockMemory
from kvtransfer.native_rows import Sums, copy_and_hash_rows, copy_rows
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

CHUNK_BYTES: Final = 8 * 1024 * 1024
"""Bytes of one native call, between two looks at the lease: half a millisecond."""

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
        for block in (min(self.blocks), max(self.blocks)) if self.blocks else ():
            if block < 0 or (block + 1) * self.block_bytes > pool_bytes:
                raise TransferError(TransferFault.LENGTH, f"The pool has no block {block}.")


def pool_of(memory: BlockMemory) -> Bytes:
    """All bytes of a pool in host memory, uint8 [num_blocks * block_bytes], no copy; not to be kept."""
    return np.frombuffer(memory.window(0, memory.num_blocks * memory.block_bytes), dtype=np.uint8)


def shares_of(count: int, most: int) -> list[tuple[int, int]]:
    """(first, count) of up to `most` shares of a number of blocks, as equal as can be."""
    bounds = [count * share // most for share in range(most + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(bounds) if high > low]


def copy_parts(
    source: Bytes,
    given: Parts,
    target: Bytes,
    taken: Parts,
    landed: Callable[[int, int, Sums | None], None],
    hashed: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Copies each given part into the taken part at its place; both have the same offset, length and number.

    `landed(first, count, sums)` is called after about every `chunk_bytes` with the blocks that are there now
    and, if `hashed`, the XXH3-64 of each; it may raise, which ends the copy. Parts must have been checked.
    """
    length = given.length
    reads, writes = given.begins() + source.ctypes.data, taken.begins() + target.ctypes.data
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
