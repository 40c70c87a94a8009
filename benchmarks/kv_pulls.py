"""Edge: the taking side of `tandem bench kv`: pulls over every road, beside what limits them, in turns.

Each round measures the limits and every road once, so that what else the machine does falls on all of them.
"""

import ctypes
import itertools
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from benchmarks.kv_layouts import SINK_STEP, SOURCE_STEP, Layout
from benchmarks.kv_source import DIGEST, FACTS, ORDER, SPEC, Order, SourceSpec, make_pool
from benchmarks.kv_times import CaseTimes, Road, Timed
from benchmarks.processes import exchange, running_module
from benchmarks.raw_tcp import RawReader
from engine.kv.kv_cache import KvCache
from kvtransfer.contract import BlockRange, HandoffKey
from kvtransfer.handoffs.sink import HandoffSink
from kvtransfer.hashing import NativeHasher
from tandem.ids import BlockId, Incarnation, LegId, WorkerId
from tandem.worker import Role, WorkerRecord

PULL_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Puller:
    """A source process, and a sink of this process for each road that it serves."""

    layout: Layout
    pool: KvCache
    process: Process
    raw: RawReader
    sinks: dict[Road, tuple[HandoffSink, WorkerRecord, int]]
    legs: "itertools.count[int]"

    async def pull(self, road: Road, given: Sequence[BlockId], targets: Sequence[BlockId]) -> Timed:
        """One hand-off of the given blocks into the targets. Raises TandemError."""
        sink, source, number = self.sinks[road]
        leg = LegId(f"leg-{next(self.legs)}")
        await exchange(self.process, ORDER.dump_json(Order(number, leg, tuple(given))) + b"\n")
        began_s = time.perf_counter()
        report = await sink.pull(
            HandoffKey(leg, 1), source, BlockRange(0, len(given)), targets, 0, PULL_TIMEOUT_S
        )
        return Timed(report, time.perf_counter() - began_s)


@asynccontextmanager
async def opened(layout: Layout, roads: Sequence[Road]) -> AsyncIterator[Puller]:
    """Starts the source process and connects a sink for each road."""
    async with AsyncExitStack() as stack:
        pool = stack.enter_context(make_pool(layout.shape, layout.pool_blocks))
        process = await stack.enter_async_context(running_module("benchmarks.kv_source"))
        line = SPEC.dump_json(SourceSpec(layout, tuple(roads))) + b"\n"
        facts = FACTS.validate_json(await exchange(process, line))
        largest = max(layout.counts) * pool.block_bytes
        raw = stack.enter_context(RawReader(facts.raw_port, largest))
        sinks = {}
        for number, (road, source) in enumerate(zip(roads, facts.workers, strict=True)):
            me = WorkerRecord(WorkerId(f"sink-{source.worker_id}"), Incarnation(1), Role.DECODE, "", DIGEST)
            sink = HandoffSink(me, pool, road.config(), time.monotonic, None)
            stack.push_async_callback(sink.close)
            sinks[road] = (sink, source, number)
        yield Puller(layout, pool, process, raw, sinks, itertools.count())


async def measured(layout: Layout, roads: Sequence[Road], rounds: int) -> list[CaseTimes]:
    """Every case of a layout, the first round of each thrown away: it opens links and touches pages."""
    async with opened(layout, roads) as puller:
        with _Copier(layout) as copier:
            return [await _case(puller, copier, count, rounds) for count in layout.counts]


async def _case(puller: Puller, copier: "_Copier", count: int, rounds: int) -> CaseTimes:
    layout = puller.layout
    given, targets = layout.blocks(count, SOURCE_STEP), layout.blocks(count, SINK_STEP)
    length = count * layout.shape.block_bytes
    memcpy_s, raw_s, hash_s = [], [], []
    hasher = NativeHasher(puller.pool)
    pulls: dict[Road, list[Timed]] = {road: [] for road in puller.sinks}
    for _ in range(rounds + 1):
        memcpy_s.append(_seconds(lambda: copier.copy(length)))
        raw_s.append(_seconds(lambda: puller.raw.read(length)))
        hash_s.append(_seconds(lambda: hasher.sums(given, 0, layout.shape.block_bytes)))
        for road, times in pulls.items():
            times.append(await puller.pull(road, given, targets))
    kept = {road: tuple(times[1:]) for road, times in pulls.items()}
    return CaseTimes(layout, count, tuple(memcpy_s[1:]), tuple(raw_s[1:]), tuple(hash_s[1:]), kept)


class _Copier:
    """memcpy on one core between two pools of touched pages, of the kind that the roads copy between."""

    def __init__(self, layout: Layout) -> None:
        self._source = make_pool(layout.shape, max(layout.counts))
        self._target = make_pool(layout.shape, max(layout.counts))

    def copy(self, length: int) -> None:
        """Copies so many bytes from the start of one pool to that of the other, in one call."""
        ctypes.memmove(self._target.pool.data_ptr(), self._source.pool.data_ptr(), length)

    def __enter__(self) -> "_Copier":
        return self

    def __exit__(self, *_error: object) -> None:
        self._source.close()
        self._target.close()


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
