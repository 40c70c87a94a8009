"""Edge: the file of an arena: frames, a word for each of them, a header, and locks that say who lives.

Frame i lies at offset i * block_bytes, the words and the header at the end. The file is in a tmpfs or a
hugetlbfs, so that it is memory; it is removed with its last member, or begun anew by the next one when all
were killed. A lock of an open file description ends when its process has unmapped the file, however it ended.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np

from kvtransfer.shm.frame_words import Words
from tandem.errors import TransferError, TransferFault

_MAGIC: Final = b"TKVarena"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("8sQQQQ16s")
_HEADER_ROOM: Final = 4096
_NEXT_MEMBER_AT: Final = 32
_GRAIN_BYTES: Final = 2 << 20
_MEMORY_FILESYSTEMS: Final = (0x01021994, 0x958458F6)
"""tmpfs and hugetlbfs, as statfs(2) names them."""

MAP_NORESERVE: Final = 0x4000
"""Of mmap(2): huge pages are taken when they are touched, not set aside for the whole length."""

_MADV_POPULATE_WRITE: Final = 23
_FLOCK: Final = struct.Struct("hhxxxxqqixxxx")
_JOINING_AT: Final = 1 << 60
_PAUSE_S: Final = 0.01
MOST_BYTES: Final = 1 << 46
"""Largest arena: more address space than a process has is not asked for."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class ArenaShape:
    """How many frames of how many bytes an arena has."""

    frames: int
    block_bytes: int

    @property
    def words_bytes(self) -> int:
        """Bytes of the words."""
        return 8 * self.frames

    def file_bytes(self, grain_bytes: int) -> int:
        """Bytes of the file, in whole (huge) pages."""
        needed = self.frames * self.block_bytes + self.words_bytes + _HEADER_ROOM
        return -(-needed // grain_bytes) * grain_bytes


class ArenaFile:
    """An arena's file, mapped; made when it is not there. Close it last: that proves that nothing is mapped.

    `bytes` are all of the file, `words` the int64 [frames] that say who owns what; `name` is the arena's for
    ever, 32 hexadecimal digits.
    """

    def __init__(self, path: Path, wanted: ArenaShape, within_s: float) -> None:
        """Returns holding the joining lock. Raises TransferError (UNSUPPORTED), one sentence."""
        self.path = path
        self.name = ""
        self.descriptor = -1
        self._fresh = False
        until_s = time.monotonic() + within_s
        try:
            while not self._open(until_s):
                self._abandon()
            self._map(wanted)
        except (OSError, ValueError) as error:
            self._abandon()
            raise _unsupported(f"{path} cannot be an arena: {error}") from error
        except TransferError:
            self._abandon()
            raise

    def lock_member(self, member: int) -> bool:
        """Takes a member's lock, which says that it lives; False while somebody has it."""
        return self._lock(fcntl.F_WRLCK, member)

    def unlock_member(self, member: int) -> None:
        """The member maps nothing any more, or will write nothing."""
        self._lock(fcntl.F_UNLCK, member)

    def lives(self, member: int) -> bool:
        """Whether another process has a member's lock."""
        return self._is_locked(member, 1)

    def others_live(self) -> bool:
        """Whether another process has any member's lock."""
        return self._is_locked(1, _JOINING_AT - 1)

    @contextmanager
    def joining(self, within_s: float) -> Iterator[None]:
        """Nobody else joins or leaves meanwhile. Raises TimeoutError."""
        self._wait_to_join(time.monotonic() + within_s)
        try:
            yield
        finally:
            self.end_joining()

    def end_joining(self) -> None:
        """Lets the next one join or leave."""
        self._lock(fcntl.F_UNLCK, _JOINING_AT)

    def next_member(self) -> int:
        """A number that no member ever had; only while joining."""
        at = len(self.bytes) - _HEADER_ROOM + _NEXT_MEMBER_AT
        number = int.from_bytes(self.bytes[at : at + 8], "little")
        self.bytes[at : at + 8] = (number + 1).to_bytes(8, "little")
        return number

    def allocate(self, runs: Sequence[tuple[int, int]]) -> None:
        """Takes memory for runs (first frame, count). Raises OSError when there is not enough."""
        size = self.shape.block_bytes
        for first, count in runs:
            os.posix_fallocate(self.descriptor, first * size, count * size)
        self.populate(runs)

    def populate(self, runs: Sequence[tuple[int, int]]) -> None:
        """Fills this process's page table for runs that have memory, so that no step pays for it.

        Raises OSError where the system cannot.
        """
        address = self.words.ctypes.data - self._words_at
        for begin, end in self._pages(runs, outward=True):
            # Not mmap.madvise, which would hold the GIL all the while: a quarter of a second for a gibibyte.
            if _libc.madvise(address + begin, end - begin, _MADV_POPULATE_WRITE):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def give_back(self, runs: Sequence[tuple[int, int]]) -> None:
        """Frees the memory of runs that nobody owns. Raises OSError."""
        for begin, end in self._pages(runs, outward=False):
            if end > begin:
                self._map_.madvise(mmap.MADV_REMOVE, begin, end - begin)

    def remove(self) -> None:
        """Takes the name away; the memory goes with the last mapping."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmaps unless a view of it is still held, which does so when it goes; idempotent."""
        if self.descriptor < 0:
            return
        os.close(self.descriptor)
        self.descriptor = -1
        del self.words
        try:
            self.bytes.release()
            self._map_.close()
        except BufferError:
            # Somebody still holds a view; the mapping goes with the last of them.
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, until_s: float) -> bool:
        """False when the file was removed by its last member meanwhile."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self.descriptor = os.open(self.path, flags, 0o600)
        _check_filesystem(self.descriptor)
        self._wait_to_join(until_s)
        found = os.fstat(self.descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise _unsupported(f"{self.path} is another user's, or open to others than its owner")
        return found.st_nlink > 0

    def _map(self, wanted: ArenaShape) -> None:
        size = os.fstat(self.descriptor).st_size
        fresh = not self.others_live()
        if fresh:
            self._check_left(size)
            # What the dead have left may be of other sizes, and its memory is not wanted.
            self._fresh = True
            grain = max(_GRAIN_BYTES, os.fstatvfs(self.descriptor).f_bsize)
            size = wanted.file_bytes(grain)
            if not 0 < size <= MOST_BYTES:
                raise _unsupported(f"an arena of {size} bytes is not possible")
            os.ftruncate(self.descriptor, 0)
            os.ftruncate(self.descriptor, size)
            # Memory that is not there would be told by a signal when it is touched, and here by an error.
            begin = wanted.frames * wanted.block_bytes
            os.posix_fallocate(self.descriptor, begin, size - begin)
        elif not _HEADER_ROOM < size <= MOST_BYTES:
            raise _unsupported(f"{self.path} is no arena")
        self._map_ = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED | MAP_NORESERVE)
        self.bytes = memoryview(self._map_)
        header = size - _HEADER_ROOM
        if fresh:
            fields = (_MAGIC, _VERSION, wanted.frames, wanted.block_bytes, 1, secrets.token_bytes(16))
            _HEADER.pack_into(self.bytes, header, *fields)
        self._read_header(size)
        if self.shape.block_bytes != wanted.block_bytes:
            message = f"{self.path} has blocks of {self.shape.block_bytes} bytes, not {wanted.block_bytes}"
            raise _unsupported(message)

    def _check_left(self, size: int) -> None:
        """Raises TransferError (UNSUPPORTED) for a file that no arena can be: somebody wants it as it is."""
        begun = os.pread(self.descriptor, len(_MAGIC), max(0, size - _HEADER_ROOM))
        if begun.strip(b"\0") and begun != _MAGIC:
            raise _unsupported(f"{self.path} is there and no arena")

    def _read_header(self, size: int) -> None:
        magic, version, frames, block_bytes, _, name = _HEADER.unpack_from(self.bytes, size - _HEADER_ROOM)
        self.shape = ArenaShape(frames, block_bytes)
        fits = 0 < frames < MOST_BYTES and 0 < block_bytes < MOST_BYTES
        if (magic, version) != (_MAGIC, _VERSION) or not fits or self.shape.file_bytes(1) > size:
            raise _unsupported(f"{self.path} is no arena of this version")
        self.name = name.hex()
        self._words_at = size - _HEADER_ROOM - self.shape.words_bytes
        self.words: Words = np.frombuffer(self.bytes, np.int64, count=frames, offset=self._words_at)

    def _wait_to_join(self, until_s: float) -> None:
        while not self._lock(fcntl.F_WRLCK, _JOINING_AT):
            if time.monotonic() >= until_s:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds its lock")
            time.sleep(_PAUSE_S)

    def _is_locked(self, first: int, count: int) -> bool:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, count, 0)
        kind = _FLOCK.unpack(fcntl.fcntl(self.descriptor, fcntl.F_OFD_GETLK, asked))[0]
        return bool(kind != fcntl.F_UNLCK)

    def _lock(self, kind: int, at: int) -> bool:
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0))
        except BlockingIOError:
            return False
        return True

    def _pages(self, runs: Sequence[tuple[int, int]], outward: bool) -> Iterator[tuple[int, int]]:
        """Byte ranges of runs in whole pages: all that they touch, or those that are theirs alone."""
        page = max(mmap.PAGESIZE, os.fstatvfs(self.descriptor).f_bsize)
        size = self.shape.block_bytes
        for first, count in runs:
            begin, end = first * size, (first + count) * size
            if outward:
                yield begin // page * page, -(-end // page) * page
            else:
                yield -(-begin // page) * page, end // page * page

    def _abandon(self) -> None:
        if self._fresh:
            self.remove()
        if self.descriptor >= 0:
            # A mapping that goes only with its last reference would keep the lock; no other file has one.
            with suppress(OSError):
                self.end_joining()
            os.close(self.descriptor)
            self.descriptor = -1


def _check_filesystem(descriptor: int) -> None:
    found = (ctypes.c_long * 64)()
    if _libc.fstatfs(descriptor, found) or found[0] not in _MEMORY_FILESYSTEMS:
        raise _unsupported("an arena must lie in a tmpfs (/dev/shm) or a hugetlbfs")


def _unsupported(message: str) -> TransferError:
    return TransferError(TransferFault.UNSUPPORTED, f"{message}.")
