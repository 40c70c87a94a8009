"""Edge: the taking side of the adoption benchmark: hand-offs of contiguous blocks that change owners.

They are those of live workers whose pools lie in one arena, beside the same hand-offs with the blocks copied.
"""

import itertools
import mmap
import time
from asyncio.subprocess import Process
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from benchmarks.kv_giver import RECORD, ArenaPool
from benchmarks.kv_layouts import ADOPTED_BLOCKS
from benchmarks.kv_pulls import PULL_TIMEOUT_S
from benchmarks.kv_source import DIGEST
from benchmarks.kv_times import ADOPTING, AdoptionTimes
from benchmarks.processes import exchange, running_module
from kvtransfer.contract import BlockRange, HandoffKey, PullReport
from kvtransfer.handoffs.adoption import Pairs
from kvtransfer.handoffs.sink import HandoffSink
from tandem.ids import BlockId, Incarnation, LegId, WorkerId
from tandem.worker import Role, WorkerRecord


async def measured_adoption(counts: tuple[int, ...], rounds: int, folder: str) -> list[AdoptionTimes]:
    """Every count of blocks of ADOPTED_BLOCKS; the first round of each is thrown away.

    The arena is made in `folder`, which must lie in a tmpfs or hugetlbfs. Raises TandemError.
    """
    async with AsyncExitStack() as stack:
        path = Path(stack.enter_context(TemporaryDirectory(dir=folder))) / "arena"
        pool = ArenaPool(path, max(counts))
        stack.callback(pool.cache.close)
        pool.write(pool.arena.blocks)
        process = await stack.enter_async_context(
            running_module("benchmarks.kv_giver", (str(path), str(max(counts))))
        )
        source = RECORD.validate_json(await exchange(process, b""))
        me = WorkerRecord(WorkerId("taker"), Incarnation(1), Role.DECODE, "", DIGEST)
        sink = HandoffSink(me, pool.cache, ADOPTING, time.monotonic, None)
        stack.push_async_callback(sink.close)
        taker = _Taker(pool, sink, process, source, itertools.count(), [])
        return [await taker.measure(count, rounds) for count in counts]


@dataclass(frozen=True, slots=True)
class _Taker:
    """What a decode worker does about one leg after the other; its blocks are free again after each."""

    pool: ArenaPool
    sink: HandoffSink
    process: Process
    source: WorkerRecord
    legs: Iterator[int]
    gave_s: list[float]

    async def measure(self, count: int, rounds: int) -> AdoptionTimes:
        """So many rounds, after a first one."""
        rows = [await self._round(count) for _ in range(rounds + 1)]
        columns = zip(*rows[1:], strict=True)
        return AdoptionTimes(count, count * ADOPTED_BLOCKS.block_bytes, *columns)

    async def _round(self, count: int) -> tuple[float, ...]:
        """Seconds, as AdoptionTimes has them."""
        taken_s = self.pool.arena.seconds
        held, report, whole_s = await self._pull(count, adopts=True)
        taken_s = self.pool.arena.seconds - taken_s
        pages = self._pages(held)
        first_read_s, later_read_s = _read_s(pages), _read_s(pages)
        copied = await self._pull(count, adopts=False)
        return taken_s + self.gave_s[-1], report.commit_s, whole_s, copied[2], first_read_s, later_read_s

    async def _pull(self, count: int, adopts: bool) -> tuple[tuple[BlockId, ...], PullReport, float]:
        """The blocks, what the sink reported, and the seconds of the whole call."""
        name = f"leg-{next(self.legs)}"
        self.gave_s.append(float(await exchange(self.process, f"{count} {name}\n".encode())))
        targets = self.pool.blocks.allocate(count)
        came = dict(zip(targets, targets, strict=True))

        def exchanged(pairs: Pairs) -> None:
            with self.pool.arena.timed():
                self.pool.blocks.exchange(pairs)
                came.update(pairs)

        began_s = time.perf_counter()
        report = await self.sink.pull(
            *(HandoffKey(LegId(name), 1), self.source, BlockRange(0, count), targets, 0, PULL_TIMEOUT_S),
            exchanged if adopts else None,
        )
        ended_s = time.perf_counter()
        held = tuple(came.values())
        self.pool.blocks.release(held)
        return held, report, ended_s - began_s

    def _pages(self, blocks: tuple[BlockId, ...]) -> list[npt.NDArray[np.uint8]]:
        """One byte of every page of blocks."""
        size = self.pool.cache.block_bytes
        windows = (self.pool.cache.window(block * size, size) for block in blocks)
        return [np.frombuffer(window, dtype=np.uint8)[:: mmap.PAGESIZE] for window in windows]


def _read_s(pages: list[npt.NDArray[np.uint8]]) -> float:
    """Seconds to read one byte of each page."""
    began_s = time.perf_counter()
    for part in pages:
        part.sum()
    return time.perf_counter() - began_s
