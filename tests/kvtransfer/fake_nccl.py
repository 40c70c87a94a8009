"""Edge: a device in host memory and a stand-in for the module cupy.cuda.nccl that moves bytes for real.

Streams are threads that run what is enqueued in order; a communicator is a unix socket between two processes
or two threads, found by its unique id. What the real library does badly can be ordered by `Mischief`.
"""

import asyncio
import ctypes
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from kvtransfer.device import Lane, Mark, PieceCopy
from kvtransfer.nccl.binding import CupyBinding
from kvtransfer.nccl.communicator import CommunicatorLimits
from kvtransfer.nccl.threaded_communicator import NcclKit
from tests.kvtransfer.pair import Pool

QUICK = CommunicatorLimits(
    open_s=0.6, stop_s=0.1, abort_s=0.4, max_open=2, max_abandoned=2, slot_bytes=32 * 1024
)
"""Bounds short enough to be waited for; a slot holds four of the tests' blocks."""

PATIENT = replace(QUICK, open_s=30.0, abort_s=30.0)
"""Bounds that a slow machine keeps, for tests that wait for none of them."""

_LENGTH = struct.Struct("!Q")


class NcclError(RuntimeError):
    """As CuPy's: knows the names of 1 to 5 only, so others raise KeyError while it is made."""

    def __init__(self, status: int) -> None:
        known = {1: "CUDA", 2: "SYSTEM", 3: "INTERNAL", 4: "ARGUMENT", 5: "USAGE"}
        self.status = status
        super().__init__(known[status])


@dataclass(slots=True)
class Mischief:
    """What goes wrong next; a status of 0 is none."""

    hang_open: bool = False
    open_status: int = 0
    send_status: int = 0
    async_status: int = 0
    hang_abort: bool = False
    send_nothing: bool = False
    truncate: bool = False
    release: threading.Event = field(default_factory=threading.Event)
    """Set by the test to let what hangs go on."""


class HostMark:
    """Done when the lane's thread came to it."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def done(self) -> bool:
        """See Mark."""
        return self.event.is_set()


class HostLane:
    """A stream: a thread and its queue."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.stream = id(self)
        _LANES[self.stream] = self
        threading.Thread(target=self._run, daemon=True, name="fake-stream").start()

    def copy(self, wanted: PieceCopy) -> None:
        """See Lane."""
        source, target = wanted.source, wanted.target
        pairs = [
            (target.address + to * target.stride_bytes, source.address + of * source.stride_bytes)
            for of, to in zip(wanted.source_indices, wanted.target_indices, strict=True)
        ]

        def run() -> None:
            for to, of in pairs:
                ctypes.memmove(to, of, wanted.piece_bytes)

        self.enqueue(run)

    def mark(self) -> Mark:
        """See Lane."""
        mark = HostMark()
        self.enqueue(mark.event.set)
        return mark

    def wait(self, mark: Mark) -> None:
        """See Lane."""
        assert isinstance(mark, HostMark)
        self.enqueue(lambda: ignore(mark.event.wait(30)))

    def enqueue(self, work: Callable[[], None]) -> None:
        """Runs it after all that was enqueued before."""
        self._work.put(work)

    async def emptied(self) -> None:
        """Until all that is enqueued now has run."""
        ran = threading.Event()
        self.enqueue(ran.set)
        assert await asyncio.to_thread(ran.wait, 30)

    def _run(self) -> None:
        while True:
            self._work.get()()


_LANES: dict[int, HostLane] = {}


def ignore(_result: object) -> None:
    return


class HostStaging:
    """Bytes of this process."""

    def __init__(self, size_bytes: int) -> None:
        self._bytes = ctypes.create_string_buffer(size_bytes)
        self.address = ctypes.addressof(self._bytes)


class HostPinned(HostStaging):
    """See Pinned."""

    @property
    def view(self) -> memoryview:
        """See Pinned."""
        return memoryview(self._bytes).cast("B")


class HostDevice:
    """See Device; free bytes go down by what staging takes."""

    def __init__(self) -> None:
        self._free_bytes = 1 << 30

    @contextmanager
    def current(self) -> Iterator[None]:
        """See Device."""
        yield

    def lane(self) -> Lane:
        """See Device."""
        return HostLane()

    def staging(self, size_bytes: int) -> HostStaging:
        """See Device."""
        self._free_bytes -= size_bytes
        return HostStaging(size_bytes)

    def pinned(self, size_bytes: int) -> "HostPinned":
        """See Device."""
        return HostPinned(size_bytes)

    def free_bytes(self) -> int:
        """See Device."""
        return self._free_bytes


class DevicePoolInHost(Pool):
    """A pool that says it is on a device, and is not to be had through shared memory."""

    device_index = 0

    @property
    def device_address(self) -> int:
        """See DeviceBlockMemory."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._view))

    def fileno(self) -> int | None:
        """None: a device has no descriptor."""
        return None


class FakeNccl:
    """Behaves like cupy.cuda.nccl as far as CupyBinding uses it; `old` takes ids as CuPy before 14 did."""

    NcclError = NcclError
    available = True

    def __init__(self, mischief: Mischief | None = None, old: bool = False) -> None:
        self.mischief = mischief or Mischief()
        self.made: list[FakeCommunicator] = []
        self.aborted: list[FakeCommunicator] = []
        self._old = old

    def get_unique_id(self) -> bytes | tuple[int, ...]:
        """128 bytes, or so many signed numbers."""
        drawn = secrets.token_bytes(128)
        return struct.unpack("128b", drawn) if self._old else drawn

    def NcclCommunicator(
        self, ranks: int, unique_id: bytes | tuple[int, ...], rank: int
    ) -> "FakeCommunicator":
        """Blocks until the other rank is there."""
        if isinstance(unique_id, bytes) is self._old:
            raise TypeError("Expected another type of id.")
        assert ranks == 2
        raw = unique_id if isinstance(unique_id, bytes) else struct.pack("128b", *unique_id)
        if self.mischief.hang_open:
            self.mischief.release.wait(30)
        if self.mischief.open_status:
            raise NcclError(self.mischief.open_status)
        made = FakeCommunicator(self, _meet(raw, rank))
        self.made.append(made)
        return made


class FakeCommunicator:
    """See cupy.cuda.nccl.NcclCommunicator."""

    def __init__(self, owner: FakeNccl, connection: socket.socket) -> None:
        self._owner = owner
        self._connection = connection
        self._broken = 0
        self.sends: list[int] = []

    def send(self, address: int, count: int, datatype: int, peer: int, stream: int) -> None:
        """Enqueues on the stream."""
        del datatype, peer
        self.sends.append(count)
        mischief = self._owner.mischief
        if mischief.send_status:
            raise NcclError(mischief.send_status)
        if mischief.send_nothing:
            _LANES[stream].enqueue(lambda: ignore(mischief.release.wait(30)))
            return
        length = count // 2 if mischief.truncate else count
        _LANES[stream].enqueue(lambda: self._guarded(lambda: self._send(address, length)))

    def recv(self, address: int, count: int, datatype: int, peer: int, stream: int) -> None:
        """Enqueues on the stream."""
        del datatype, peer
        _LANES[stream].enqueue(lambda: self._guarded(lambda: self._receive(address, count)))

    def check_async_error(self) -> None:
        """What broke meanwhile."""
        status = self._broken or self._owner.mischief.async_status
        if status:
            raise NcclError(status)

    def abort(self) -> None:
        """Breaks the socket, which ends what runs on the streams."""
        if self._owner.mischief.hang_abort:
            self._owner.mischief.release.wait(30)
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            self._broken = 6
        self._connection.close()
        self._owner.aborted.append(self)

    def _guarded(self, work: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            work()
        except OSError:
            self._broken = 6

    def _send(self, address: int, count: int) -> None:
        self._connection.sendall(_LENGTH.pack(count) + ctypes.string_at(address, count))

    def _receive(self, address: int, count: int) -> None:
        (length,) = _LENGTH.unpack(_exactly(self._connection, _LENGTH.size))
        if length != count:
            self._broken = 3
            return
        ctypes.memmove(address, _exactly(self._connection, count), count)


def _exactly(connection: socket.socket, length: int) -> bytes:
    received = bytearray()
    while len(received) < length:
        part = connection.recv(length - len(received))
        if not part:
            raise ConnectionResetError
        received += part
    return bytes(received)


def _meet(unique_id: bytes, rank: int) -> socket.socket:
    """Rank 0 listens under the id, rank 1 knocks until it does; like NCCL, for ever (here: 30 s)."""
    name = b"\0fake-nccl-" + unique_id[:32].hex().encode()
    deadline = threading.Event()
    for _ in range(3000):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if rank == 0:
            made.bind(name)
            made.listen(1)
            made.settimeout(30)
            with made:
                connection, _ = made.accept()
            return connection
        try:
            made.connect(name)
        except OSError:
            made.close()
            deadline.wait(0.01)
            continue
        return made
    raise NcclError(2)


def host_kit(nccl: FakeNccl, limits: CommunicatorLimits = PATIENT) -> NcclKit:
    """A kit over host memory."""
    device = HostDevice()
    return NcclKit(lambda: CupyBinding(nccl), lambda _index: device, limits)
