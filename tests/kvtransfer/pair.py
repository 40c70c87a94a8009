"""Edge: a source with a real gRPC server, a sink, and pools of known bytes, for tests of transfers."""

import asyncio
import mmap
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from kvtransfer.coded_sink import CodedSink
from kvtransfer.coded_source import CodedSource
from kvtransfer.contract import (
    BlockMemory,
    BlockRange,
    HandoffKey,
    KvGiver,
    PullReport,
    SinkTransport,
    SourceTransport,
    TransferConfig,
    TransferObserver,
)
from kvtransfer.handoffs.service import HandoffServicer
from kvtransfer.handoffs.sink import HandoffSink
from kvtransfer.handoffs.source import HandoffSource
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.staging import StagedMemory
from kvtransfer.transports import sink_transports, source_transports
from tandem import grpc_edge
from tandem.ids import BlockId, Incarnation, LegId, WorkerId
from tandem.v1.worker_pb2_grpc import add_HandoffServiceServicer_to_server
from tandem.worker import Role, WorkerRecord
from tests.kvtransfer.coding import Coding

TOKEN = "a token"


class Pool:
    """Blocks in a memfd, as the engine's cache has them."""

    def __init__(self, num_blocks: int, block_bytes: int, layers: int = 4) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.layer_bytes = block_bytes // layers
        self._descriptor = os.memfd_create("test-pool", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, num_blocks * block_bytes)
        self._pages = mmap.mmap(self._descriptor, num_blocks * block_bytes)
        self._view = memoryview(self._pages)

    def view(self, block: BlockId) -> memoryview:
        """Writable bytes of one block."""
        return self._view[block * self.block_bytes : (block + 1) * self.block_bytes]

    def window(self, begin: int, length: int) -> memoryview:
        """Writable bytes from `begin` on."""
        return self._view[begin : begin + length]

    def fileno(self) -> int | None:
        """The memfd."""
        return self._descriptor

    def fill(self, seed: int) -> None:
        """Random bytes, equal for equal seeds."""
        self._view[:] = random.Random(seed).randbytes(len(self._view))

    def read(self, blocks: Sequence[BlockId]) -> list[bytes]:
        """Copies of blocks."""
        return [bytes(self.view(block)) for block in blocks]

    def close(self) -> None:
        """Unmaps it."""
        self._view.release()
        self._pages.close()
        os.close(self._descriptor)


def record(name: str, role: Role, address: str = "", incarnation: int = 1, digest: str = "d") -> WorkerRecord:
    """A worker for tests."""
    return WorkerRecord(WorkerId(name), Incarnation(incarnation), role, address, digest)


def blocks(*numbers: int) -> tuple[BlockId, ...]:
    """Block ids from plain numbers."""
    return tuple(BlockId(number) for number in numbers)


def key(leg: str, epoch: int = 1) -> HandoffKey:
    """A key from plain values."""
    return HandoffKey(LegId(leg), epoch)


def config(*transports: str, **changes: float | bool) -> TransferConfig:
    """A configuration with these transports."""
    return TransferConfig(transports=transports, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Roads:
    """What makes the pools of a pair, and the transports between them."""

    pool: Callable[[int, int], Pool]
    giving: Callable[[BlockMemory, TransferConfig], Sequence[SourceTransport]]
    taking: Callable[[BlockMemory, TransferConfig], Sequence[SinkTransport]]


HOST_ROADS = Roads(
    Pool, source_transports, lambda pool, settings: sink_transports(pool, settings, time.monotonic)
)
"""Pools in shared memory and the transports that the settings name."""


@dataclass(slots=True)
class Pair:
    """A source and a sink in this process; what the source gave back is in `released`."""

    source_pool: Pool
    sink_pool: Pool
    source: HandoffSource
    sink: HandoffSink
    source_record: WorkerRecord
    released: list[tuple[HandoffKey, ReleaseReason]] = field(default_factory=list)
    coding: Coding | None = None

    def expected(self, given: Sequence[BlockId]) -> list[bytes]:
        """What the sink must hold of blocks of the source: them, or what the codec leaves of them."""
        held = self.source_pool.read(given)
        return held if self.coding is None else self.coding.through(held)

    async def pull(
        self, name: HandoffKey, wanted: BlockRange, targets: Sequence[BlockId], remaining_s: float = 20.0
    ) -> PullReport:
        """Pulls with priority 0."""
        return await self.sink.pull(name, self.source_record, wanted, targets, 0, remaining_s)

    async def wait_released(self, count: int, within_s: float) -> None:
        """Until so many hand-offs are over at the source."""
        await eventually(lambda: len(self.released) >= count, within_s)


async def eventually(condition: Callable[[], bool], within_s: float) -> None:
    """Waits for a condition; raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


class LegOwner(KvGiver, Protocol):
    """Who has the legs that a source offers."""

    def release(self, key: HandoffKey, reason: ReleaseReason) -> None:
        """An offer is over."""
        ...


@asynccontextmanager
async def served_source(
    pool: BlockMemory,
    settings: TransferConfig,
    released: list[tuple[HandoffKey, ReleaseReason]],
    transports: Sequence[SourceTransport] | None = None,
    observer: TransferObserver | None = None,
    legs: LegOwner | None = None,
) -> AsyncIterator[tuple[HandoffSource, WorkerRecord]]:
    """A source behind a gRPC server on the host of its data connections; `legs` can be adopted."""
    me = record("prefill-0", Role.PREFILL)
    end = (lambda *end: released.append(end)) if legs is None else legs.release
    rest = (settings, time.monotonic, end, transports, observer)
    source: HandoffSource
    source = (
        CodedSource(me, pool, *rest)
        if isinstance(pool, StagedMemory)
        else HandoffSource(me, pool, *rest, legs)
    )
    await source.start()
    server = grpc_edge.server(TOKEN)
    add_HandoffServiceServicer_to_server(HandoffServicer(source), server)
    port = server.add_insecure_port(f"{settings.bind_host}:0")
    await server.start()
    try:
        yield source, record("prefill-0", Role.PREFILL, f"{settings.advertise_host}:{port}")
    finally:
        await source.close()
        await server.stop(grace=0)


@asynccontextmanager
async def connected_pair(
    settings: TransferConfig,
    num_blocks: int = 32,
    block_bytes: int = 8192,
    wrap_sink: Callable[[SinkTransport, BlockMemory], SinkTransport] | None = None,
    wrap_source: Callable[[SourceTransport], SourceTransport] | None = None,
    sink_settings: TransferConfig | None = None,
    sink_digest: str = "d",
    observer: TransferObserver | None = None,
    roads: Roads = HOST_ROADS,
    coding: Coding | None = None,
) -> AsyncIterator[Pair]:
    """A source and a sink over real sockets, closed at the end, sink first.

    With `coding` blocks move encoded: transports and what wraps them see the encoded pools.
    """
    source_pool, sink_pool = roads.pool(num_blocks, block_bytes), roads.pool(num_blocks, block_bytes)
    for seed, pool in enumerate((source_pool, sink_pool), start=1):
        pool.fill(seed) if coding is None else coding.fill(pool, seed)
    with ExitStack() as stack:
        of, to = [
            pool if coding is None else stack.enter_context(coding.staged(pool))
            for pool in (source_pool, sink_pool)
        ]
        giving = roads.giving(of, settings)
        taking = roads.taking(to, sink_settings or settings)
        if wrap_source is not None:
            giving = tuple(wrap_source(transport) for transport in giving)
        if wrap_sink is not None:
            taking = tuple(wrap_sink(transport, to) for transport in taking)
        released: list[tuple[HandoffKey, ReleaseReason]] = []
        async with served_source(of, settings, released, giving, observer) as (source, source_record):
            me = record("decode-0", Role.DECODE, digest=sink_digest)
            rest = (sink_settings or settings, time.monotonic, TOKEN, taking, observer)
            made = CodedSink(me, to, *rest) if isinstance(to, StagedMemory) else HandoffSink(me, to, *rest)
            try:
                yield Pair(source_pool, sink_pool, source, made, source_record, released, coding)
            finally:
                await made.close()
    source_pool.close()
    sink_pool.close()


async def outcome_of(work: Awaitable[object]) -> BaseException | None:
    """What an awaitable raised, if it did."""
    try:
        await work
    except BaseException as error:
        return error
    return None
