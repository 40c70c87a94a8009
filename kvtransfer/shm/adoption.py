"""Edge: a pool whose blocks change places with those of another process's pool, without copying a byte.

Not used by live hand-offs yet (docs/decisions/004-adopting-pages.md says why); `tandem bench kv` measures it.
"""

import ctypes
import fcntl
import mmap
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import numpy as np

from kvtransfer.shm.page_table import Frames, Mapping, PageTable, SegmentId, mappings_of
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True, slots=True)
class _Segment:
    """A shared memory known here, and how many frames it has."""

    descriptor: int
    frames: int


class AdoptablePool:
    """Blocks at fixed addresses, behind which lie frames of this process's memory or of another's.

    Methods that end an exchange cost a system call for each run of blocks, however many bytes these have.
    """

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        """Raises TransferError (UNSUPPORTED) when blocks are not whole pages, or there is no memory."""
        if block_bytes % mmap.PAGESIZE or block_bytes <= 0 or num_blocks < 1:
            message = f"Blocks of {block_bytes} bytes are not whole pages of {mmap.PAGESIZE}."
            raise TransferError(TransferFault.UNSUPPORTED, message)
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.segment = SegmentId(secrets.randbits(63))
        self.table = PageTable(self.segment, num_blocks)
        size = num_blocks * block_bytes
        self._segments: dict[SegmentId, _Segment] = {}
        self._address = _mapped(None, size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        try:
            self._segments[self.segment] = _Segment(_sealed_memory(size), num_blocks)
            self._map(Mapping(BlockId(0), self.segment, 0, num_blocks))
        except (OSError, TransferError) as error:
            self.close()
            raise TransferError(TransferFault.UNSUPPORTED, f"No memory for a pool: {error}.") from error

    @property
    def descriptors(self) -> dict[SegmentId, int]:
        """Descriptors of the segments known here, to be sent to a peer that is to use their frames."""
        return {name: segment.descriptor for name, segment in self._segments.items()}

    def view(self, block: BlockId) -> memoryview:
        """Writable bytes of one block; must not be kept over an exchange of it, nor beyond `close`."""
        if not 0 <= block < self.num_blocks:
            raise IndexError(f"block {block} is outside a pool of {self.num_blocks}")
        return self.window(block * self.block_bytes, self.block_bytes)

    def window(self, begin: int, length: int) -> memoryview:
        """Writable bytes [begin, begin + length) of the pool; as for `view`."""
        return memoryview((ctypes.c_char * length).from_address(self._address + begin)).cast("B")

    def attach(self, segment: SegmentId, descriptor: int) -> None:
        """Makes a peer's segment usable; the descriptor is duplicated. Idempotent.

        Raises TransferError (UNSUPPORTED) unless the memory is sealed: a peer that shrank it would kill us.
        """
        if segment in self._segments:
            return
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK:
            raise TransferError(TransferFault.UNSUPPORTED, "The peer's memory could shrink.")
        frames = os.fstat(descriptor).st_size // self.block_bytes
        self._segments[segment] = _Segment(os.dup(descriptor), frames)

    def detach_unused(self) -> None:
        """Closes peers' segments of which no frame lies behind a block, so that their memory can go."""
        for segment in self._segments.keys() - self.table.segments - {self.segment}:
            os.close(self._segments.pop(segment).descriptor)

    def begin(self, number: int, blocks: Sequence[BlockId]) -> Frames:
        """Puts blocks on offer; their content stays, and must not change, until the exchange ended.

        Takes the pages out of this process's page table: that costs 65 microseconds a MiB (measured), and is
        done here because nobody waits for it yet. Raises ProtocolError for what is in an exchange already.
        """
        frames = self.table.begin(number, blocks)
        for mapping in mappings_of(np.asarray(blocks, dtype=np.int64), frames):
            begin = self._address + mapping.block * self.block_bytes
            _libc.madvise(begin, mapping.count * self.block_bytes, mmap.MADV_DONTNEED)
        return frames

    def settle(self, number: int, theirs: Frames) -> None:
        """The blocks of the exchange now have the peer's frames. Repeating it changes nothing.

        Raises ProtocolError as PageTable does, and TransferError (LENGTH, UNSUPPORTED), before anything
        changes, for frames that are not in a segment known here.
        """
        self._check(theirs)
        for mapping in self.table.settle(number, theirs):
            self._map(mapping)

    def cancel(self, number: int) -> None:
        """Nothing was exchanged. Raises ProtocolError when it was settled or is not known."""
        self.table.cancel(number)

    def close(self) -> None:
        """Unmaps all; no view may be used any more. Idempotent."""
        if self._address:
            _libc.munmap(self._address, self.num_blocks * self.block_bytes)
            self._address = 0
        while self._segments:
            os.close(self._segments.popitem()[1].descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, frames: Frames) -> None:
        for name in np.unique(frames.segments):
            segment = self._segments.get(SegmentId(int(name)))
            if segment is None:
                message = "A frame lies in memory that is not known here."
                raise TransferError(TransferFault.UNSUPPORTED, message)
            indices = frames.indices[frames.segments == name]
            if indices.min() < 0 or indices.max() >= segment.frames:
                raise TransferError(TransferFault.LENGTH, "A frame lies outside of its segment.")

    def _map(self, mapping: Mapping) -> None:
        _mapped(
            self._address + mapping.block * self.block_bytes,
            mapping.count * self.block_bytes,
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_SHARED | _MAP_FIXED,
            self._segments[mapping.segment].descriptor,
            mapping.index * self.block_bytes,
        )


def _sealed_memory(size_bytes: int) -> int:
    descriptor = os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _mapped(
    address: int | None, length: int, protection: int, flags: int, descriptor: int, offset: int
) -> int:
    """The address. Raises TransferError (UNSUPPORTED) with the system's words."""
    got = _libc.mmap(address, length, protection, flags, descriptor, offset)
    if got is None or got == _MAP_FAILED:
        message = f"Pages cannot be mapped: {os.strerror(ctypes.get_errno())}."
        raise TransferError(TransferFault.UNSUPPORTED, message)
    return int(got)
