"""Edge: a pool's bytes where sockets reach them: in place in host memory, through pinned memory on a GPU.

Both sides are generators that a thread steps through: what was yielded may be sent, or has been filled, when
it is resumed. Pinned memory comes in pairs of slots, so that the device copies one while the other is on the
wire; only the device's own copies touch the pool, and none is under way when a generator has ended.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from kvtransfer.block_copy import Parts, batches
from kvtransfer.contract import BlockMemory, DeviceBlockMemory
from kvtransfer.device import Device, DevicePool, Lane, Mark, PieceCopy, Pieces, Pinned
from kvtransfer.nccl.pack_plan import Chunk, chunks
from kvtransfer.watch import outwait, wait_for
from tandem.ids import BlockId

SLOT_BYTES: Final = 4 * 1024 * 1024
"""Of each slot, or a block if that is larger: on the wire for many times what starting a copy costs."""

MOST_PAIRS: Final = 8
"""Pairs of slots of one side; more transfers at one time wait for one."""

WAIT_S: Final = 0.02
"""Pause between two looks at whether a transfer that waits for slots should go on."""

GIVEN_BYTES: Final = 4 * 1024 * 1024
"""Bytes of a pool in host memory that are sent at once: few calls, yet a lease is looked at often enough."""

LANDED_BYTES: Final = 256 * 1024
"""Bytes after which blocks in host memory are told of: they are in the core's own cache still."""

QUIET_S: Final = 1.0
"""Bound of copies that are under way when a transfer ends; they wait for no peer."""

Views = Sequence[memoryview]
Taking = Generator[tuple[int, int, Views], None, None]


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes [offset, offset + size) of each of some blocks."""

    blocks: Sequence[BlockId]
    offset_bytes: int
    size_bytes: int


class HostPages(Protocol):
    """A pool as the threads of a transport that sends reach it; `check` is called while something waits."""

    @property
    def lands_in_place(self) -> bool:
        """Whether what `taking` yielded is in the pool as soon as it is filled."""
        ...

    def giving(self, part: Part, check: Callable[[], None]) -> Generator[Views, None, None]:
        """The part's bytes, in order; views are valid until the next step. Raises what `check` raises."""
        ...

    def taking(self, part: Part, check: Callable[[], None]) -> Taking:
        """(first, count, views to be filled) until the part is whole; all is in the pool when it ends."""
        ...


class MappedPages:
    """See HostPages; a pool in host memory."""

    lands_in_place = True

    def __init__(self, memory: BlockMemory) -> None:
        self._memory = memory

    def giving(self, part: Part, check: Callable[[], None]) -> Generator[Views, None, None]:
        """See HostPages; made as they are sent: the sink has the first ones by the time of the last."""
        for _, _, views in self._steps(part, GIVEN_BYTES):
            yield views

    def taking(self, part: Part, check: Callable[[], None]) -> Taking:
        """See HostPages."""
        return self._steps(part, LANDED_BYTES)

    def _steps(self, part: Part, most_bytes: int) -> Taking:
        memory, size = self._memory, part.size_bytes
        pool = memory.window(0, memory.num_blocks * memory.block_bytes)
        parts = Parts(part.blocks, memory.block_bytes, part.offset_bytes, size)
        begins = parts.begins(len(pool)).tolist()
        for first, count in batches(len(begins), size, most_bytes):
            yield first, count, [pool[begin : begin + size] for begin in begins[first : first + count]]


@dataclass(frozen=True, slots=True)
class _Slots:
    """Two pinned slots and the stream of their copies."""

    lane: Lane
    pinned: tuple[Pinned, Pinned]


class PinnedPages:
    """See HostPages; a pool on a device, through pinned memory."""

    lands_in_place = False

    def __init__(self, pool: DevicePool, device: Device) -> None:
        self._pool = pool
        self._device = device
        self._slot_bytes = max(SLOT_BYTES, pool.block_bytes)
        self._room = threading.BoundedSemaphore(MOST_PAIRS)
        self._idle: list[_Slots] = []

    def giving(self, part: Part, check: Callable[[], None]) -> Generator[Views, None, None]:
        """See HostPages; the next chunk is copied while one is sent."""
        plan = chunks(len(part.blocks), part.size_bytes, self._slot_bytes)
        with self._slots(check) as slots:
            marks: list[Mark] = []
            for number in range(len(plan) + 1):
                if number < len(plan):
                    marks.append(self._copied(slots, part, plan[number], number % 2, out=True))
                if number > 0:
                    wait_for(marks[number - 1], check)
                    yield [slots.pinned[(number - 1) % 2].view[: plan[number - 1].size_bytes]]

    def taking(self, part: Part, check: Callable[[], None]) -> Taking:
        """See HostPages; one chunk is copied while the next one comes."""
        with self._slots(check) as slots:
            marks: list[Mark | None] = [None, None]
            for number, chunk in enumerate(chunks(len(part.blocks), part.size_bytes, self._slot_bytes)):
                before = marks[number % 2]
                if before is not None:
                    wait_for(before, check)
                yield chunk.first, chunk.count, [slots.pinned[number % 2].view[: chunk.size_bytes]]
                marks[number % 2] = self._copied(slots, part, chunk, number % 2, out=False)
            for mark in filter(None, marks):
                wait_for(mark, check)

    def _copied(self, slots: _Slots, part: Part, chunk: Chunk, slot: int, out: bool) -> Mark:
        """A point after the copy of a chunk between pool and slot, which it starts."""
        blocks: Sequence[int] = part.blocks[chunk.first : chunk.first + chunk.count]
        places: Sequence[int] = range(chunk.count)
        pool = self._pool.pieces(part.offset_bytes), blocks
        host = Pieces(slots.pinned[slot].address, part.size_bytes), places
        (source, of), (target, to) = (pool, host) if out else (host, pool)
        with self._device.current():
            slots.lane.copy(PieceCopy(source, of, target, to, part.size_bytes))
            return slots.lane.mark()

    @contextmanager
    def _slots(self, check: Callable[[], None]) -> Iterator[_Slots]:
        """A pair for one transfer. Slots whose copies did not end in time are never used again."""
        while not self._room.acquire(timeout=WAIT_S):
            check()
        try:
            slots = self._idle.pop() if self._idle else self._made()
            try:
                yield slots
            finally:
                with self._device.current():
                    mark = slots.lane.mark()
                outwait(mark, QUIET_S)
                self._idle.append(slots)
        finally:
            self._room.release()

    def _made(self) -> _Slots:
        with self._device.current():
            pinned = self._device.pinned(self._slot_bytes), self._device.pinned(self._slot_bytes)
            return _Slots(self._device.lane(), pinned)


def pages_of(memory: BlockMemory, open_device: Callable[[int], Device]) -> HostPages:
    """How sockets reach a pool. Raises OSError, in a sentence, when its device cannot be used."""
    if isinstance(memory, DeviceBlockMemory) and memory.device_index is not None:
        pool = DevicePool.of(memory)
        return PinnedPages(pool, open_device(pool.device_index))
    return MappedPages(memory)
