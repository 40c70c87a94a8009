"""Edge: a source and a sink whose pools lie in one arena, for tests of hand-offs that adopt."""

import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.kv.blocks import BlockPool
from kvtransfer.contract import (
    BlockMemory,
    BlockRange,
    HandoffKey,
    PullReport,
    SinkTransport,
    SourceTransport,
    TransferConfig,
)
from kvtransfer.handoffs.adoption import Pairs
from kvtransfer.handoffs.sink import HandoffSink
from kvtransfer.handoffs.source import HandoffSource
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.shm.arena import Arena
from kvtransfer.transports import sink_transports, source_transports
from tandem.ids import BlockId, LegId
from tandem.worker import Role, WorkerRecord
from tests.kvtransfer.pair import TOKEN, eventually, record, served_source

LAYERS = 4


class ArenaPool:
    """A BlockMemory in an arena, and the account of its blocks."""

    def __init__(self, path: Path, num_blocks: int, block_bytes: int, kind: type[Arena] = Arena) -> None:
        self.memory = kind(path, num_blocks, block_bytes)
        self.block_bytes = block_bytes
        self.layer_bytes = block_bytes // LAYERS
        self.num_blocks = self.memory.num_blocks
        self.pool = BlockPool(num_blocks, 1, False, self.memory.blocks, self.num_blocks)

    def view(self, block: BlockId) -> memoryview:
        """Writable bytes of one block."""
        return self.window(block * self.block_bytes, self.block_bytes)

    def window(self, begin: int, length: int) -> memoryview:
        """Writable bytes from `begin` on."""
        return self.memory.bytes[begin : begin + length]

    def fileno(self) -> int | None:
        """The arena's file."""
        return self.memory.descriptor

    def fill(self, blocks: Sequence[BlockId], seed: int) -> list[bytes]:
        """Random bytes, equal for equal seeds; what they are."""
        chance = random.Random(seed)
        for block in blocks:
            self.view(block)[:] = chance.randbytes(self.block_bytes)
        return self.read(blocks)

    def read(self, blocks: Sequence[BlockId]) -> list[bytes]:
        """Copies of blocks."""
        return [bytes(self.view(block)) for block in blocks]

    def check(self, *held: Sequence[BlockId]) -> None:
        """The account and the arena agree."""
        self.pool.check_integrity(held)
        assert {*self.memory.owned()} == self.pool._own


@dataclass(slots=True)
class Legs:
    """The source's legs, as its scheduler has them; `busy` while a step touches them (`refused` so often)."""

    pool: ArenaPool
    tables: dict[LegId, tuple[BlockId, ...]] = field(default_factory=dict)
    released: list[tuple[HandoffKey, ReleaseReason]] = field(default_factory=list)
    busy: bool = False
    refused: int = 0
    before_giving: Callable[[], object] = lambda: None

    def give(self, leg_id: LegId, taker: int, given: Sequence[BlockId], taken: Sequence[BlockId]) -> bool:
        """See KvGiver."""
        if self.busy:
            self.refused += 1
            return False
        self.before_giving()
        pairs = self.pool.memory.give(taker, given, taken)
        self.pool.pool.exchange(pairs)
        came = dict(pairs)
        self.tables[leg_id] = tuple(came.get(block, block) for block in self.tables[leg_id])
        return bool(pairs)

    def release(self, key: HandoffKey, reason: ReleaseReason) -> None:
        """An offer is over."""
        self.released.append((key, reason))
        self.pool.pool.release(self.tables.pop(key.leg_id))


@dataclass(slots=True)
class ArenaPair:
    """A source and a sink in this process."""

    source_pool: ArenaPool
    sink_pool: ArenaPool
    source: HandoffSource
    sink: HandoffSink
    source_record: WorkerRecord
    legs: Legs

    def read_prompt(self, name: HandoffKey, count: int, seed: int) -> list[bytes]:
        """A leg of so many blocks at the source; what they hold."""
        table = self.source_pool.pool.allocate(count)
        self.legs.tables[name.leg_id] = table
        return self.source_pool.fill(table, seed)

    async def pull(
        self, name: HandoffKey, wanted: BlockRange, remaining_s: float = 20.0
    ) -> tuple[tuple[BlockId, ...], PullReport]:
        """The blocks that hold the KV at the sink, which go back to its pool when this fails."""
        table = list(self.sink_pool.pool.allocate(wanted.num_blocks))

        def exchanged(pairs: Pairs) -> None:
            self.sink_pool.pool.exchange(pairs)
            came = dict(pairs)
            table[:] = [came.get(block, block) for block in table]

        try:
            report = await self.sink.pull(
                name, self.source_record, wanted, tuple(table), 0, remaining_s, exchanged
            )
        except BaseException:
            self.sink_pool.pool.release(table)
            raise
        return tuple(table), report

    async def settled(self, *held: Sequence[BlockId]) -> None:
        """Until the source has all its blocks back; `held` are the sink's tables."""
        await eventually(lambda: not self.legs.tables, 20.0)
        self.source_pool.check()
        self.sink_pool.check(*held)
        assert not {*self.source_pool.memory.owned()} & {*self.sink_pool.memory.owned()}


@asynccontextmanager
async def arena_pair(
    settings: TransferConfig,
    num_blocks: int = 16,
    block_bytes: int = 8192,
    wrap_sink: Callable[[SinkTransport, BlockMemory], SinkTransport] = lambda inner, _pool: inner,
    wrap_source: Callable[[SourceTransport], SourceTransport] = lambda inner: inner,
) -> AsyncIterator[ArenaPair]:
    """A source and a sink over real sockets, closed at the end, sink first."""
    with ExitStack() as stack:
        path = Path(stack.enter_context(TemporaryDirectory(dir="/dev/shm"))) / "arena"
        pools = [ArenaPool(path, num_blocks, block_bytes) for _ in range(2)]
        for pool in pools:
            stack.enter_context(pool.memory)
        source_pool, sink_pool = pools
        giving = [wrap_source(inner) for inner in source_transports(source_pool, settings)]
        taking = [
            wrap_sink(inner, sink_pool) for inner in sink_transports(sink_pool, settings, time.monotonic)
        ]
        legs = Legs(source_pool)
        async with served_source(source_pool, settings, [], giving, legs=legs) as (source, told):
            me = record("decode-0", Role.DECODE)
            sink = HandoffSink(me, sink_pool, settings, time.monotonic, TOKEN, taking)
            try:
                yield ArenaPair(source_pool, sink_pool, source, sink, told, legs)
            finally:
                await sink.close()
