"""Edge: who computes the checksums of a pool's blocks: the CPU for host memory, the device for its own."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol

from kvtransfer import weighted_sum
from kvtransfer.block_copy import CHUNK_BYTES, Parts, Span, batches
from kvtransfer.checksums import XXH3
from kvtransfer.contract import BlockMemory, DeviceBlockMemory
from kvtransfer.device import DevicePool
from kvtransfer.native_rows import hash_rows
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

INLINE_BYTES: Final = 1 << 20
"""Up to so many bytes are hashed on the event loop: a tenth of a millisecond, less than a thread costs."""


Sums = Callable[[int, int], Sequence[int]]
"""The checksums of (first, count) of some parts; from any thread."""


class Hasher(Protocol):
    """Computes one kind of checksum over one pool; from any thread."""

    @property
    def name(self) -> str:
        """As a pair agrees on it."""
        ...

    @property
    def inline_bytes(self) -> int:
        """Up to so many bytes may be hashed on the event loop."""
        ...

    def sums(
        self,
        blocks: Sequence[BlockId],
        part_offset: int,
        part_bytes: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[int, ...]:
        """A checksum of the bytes [part_offset, part_offset + part_bytes) of each block, in order.

        Raises TransferError: TIMEOUT soon after `stopped` says so, UNSUPPORTED where it cannot be computed.
        """
        ...

    def over(self, blocks: Sequence[BlockId], part_offset: int, part_bytes: int) -> Sums:
        """For hashing parts of those blocks a few at a time; raises, and what it gives raises, as `sums`."""
        ...


class NativeHasher:
    """XXH3-64 of host memory, many blocks in a native call."""

    name = XXH3
    inline_bytes = INLINE_BYTES

    def __init__(self, memory: BlockMemory) -> None:
        self._memory = memory

    def sums(
        self,
        blocks: Sequence[BlockId],
        part_offset: int,
        part_bytes: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[int, ...]:
        """See Hasher."""
        some = self.over(blocks, part_offset, part_bytes)
        found: list[int] = []
        for first, count in batches(len(blocks), part_bytes, CHUNK_BYTES):
            if stopped():
                raise TransferError(TransferFault.TIMEOUT, "Hashing was stopped.")
            found.extend(some(first, count))
        return tuple(found)

    def over(self, blocks: Sequence[BlockId], part_offset: int, part_bytes: int) -> Sums:
        """See Hasher; the addresses are computed once."""
        parts = Parts(blocks, self._memory.block_bytes, part_offset, part_bytes)
        begins = parts.addresses(Span.of_pool(self._memory))

        def some(first: int, count: int) -> Sequence[int]:
            found: list[int] = hash_rows(begins[first : first + count], part_bytes).tolist()
            return found

        return some


class HostHasher:
    """wsum64 of host memory, block by block: for a pair whose other pool is on a device."""

    name = weighted_sum.NAME
    inline_bytes = INLINE_BYTES

    def __init__(self, memory: BlockMemory) -> None:
        self._memory = memory

    def sums(
        self,
        blocks: Sequence[BlockId],
        part_offset: int,
        part_bytes: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[int, ...]:
        """See Hasher."""
        found = []
        for block in blocks:
            if stopped():
                raise TransferError(TransferFault.TIMEOUT, "Hashing was stopped.")
            part = self._memory.view(block)[part_offset : part_offset + part_bytes]
            found.append(weighted_sum.weighted_sum(part))
        return tuple(found)

    def over(self, blocks: Sequence[BlockId], part_offset: int, part_bytes: int) -> Sums:
        """See Hasher."""
        return lambda first, count: self.sums(blocks[first : first + count], part_offset, part_bytes)


class DeviceHasher:
    """wsum64 by the device that holds the pool; one launch for all blocks, so it is not stopped half way."""

    name = weighted_sum.NAME
    inline_bytes = 0

    def __init__(self, memory: BlockMemory) -> None:
        self._memory = memory

    def sums(
        self,
        blocks: Sequence[BlockId],
        part_offset: int,
        part_bytes: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[int, ...]:
        """See Hasher."""
        from kvtransfer.cuda.device import device_checksums

        if stopped():
            raise TransferError(TransferFault.TIMEOUT, "Hashing was stopped.")
        try:
            return device_checksums(DevicePool.of(self._memory), blocks, part_offset, part_bytes)
        except OSError as error:
            raise TransferError(TransferFault.UNSUPPORTED, str(error)) from error

    def over(self, blocks: Sequence[BlockId], part_offset: int, part_bytes: int) -> Sums:
        """See Hasher."""
        return lambda first, count: self.sums(blocks[first : first + count], part_offset, part_bytes)


def hashers(memory: BlockMemory) -> Mapping[str, Hasher]:
    """The checksums that can be computed of a pool, by the names that a pair agrees on, best first."""
    if isinstance(memory, DeviceBlockMemory) and memory.device_index is not None:
        return MappingProxyType({weighted_sum.NAME: DeviceHasher(memory)})
    return MappingProxyType({XXH3: NativeHasher(memory), weighted_sum.NAME: HostHasher(memory)})
