"""Edge: the giving process of the adoption benchmark: `python -m benchmarks.kv_giver ARENA BLOCKS`.

Answers with its WorkerRecord, and then to each line, a number of blocks and a leg's name, once it has written
so many blocks of its pool and offers them, with the seconds that it took to give the last ones away that were
adopted. Ends with stdin.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import torch
from pydantic import TypeAdapter

from benchmarks.kv_layouts import ADOPTED_BLOCKS, BLOCK_SIZE
from benchmarks.kv_source import DIGEST, sourced
from benchmarks.kv_times import ADOPTING
from engine.kv.blocks import BlockPool
from engine.kv.kv_cache import KvCache
from kvtransfer.contract import HandoffKey
from kvtransfer.handoffs.source import HandoffSource
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.shm.arena import Arena
from tandem.ids import BlockId, Incarnation, LegId, WorkerId
from tandem.logs import configure_logging
from tandem.worker import Role, WorkerRecord

RECORD = TypeAdapter(WorkerRecord)


class TimedArena(Arena):
    """Adds up in `seconds` what its side of exchanges takes, and what else is done inside of `timed`."""

    seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What is done inside counts."""
        began_s = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began_s

    def offer(self, giver: int, taken: Sequence[BlockId]) -> None:
        """See Arena."""
        with self.timed():
            super().offer(giver, taken)

    def settle(
        self, giver: int, given: Sequence[BlockId], taken: Sequence[BlockId]
    ) -> tuple[tuple[BlockId, BlockId], ...]:
        """See Arena."""
        with self.timed():
            return super().settle(giver, given, taken)


class ArenaPool:
    """The engine's pool in an arena, and the account of its blocks."""

    def __init__(self, path: Path, num_blocks: int) -> None:
        shape, device = ADOPTED_BLOCKS, torch.device("cpu")
        self.arena = TimedArena(path, num_blocks, shape.block_bytes)
        model = shape.model()
        self.cache = KvCache(
            model, num_blocks, BLOCK_SIZE, torch.float32, device, lambda _blocks, _bytes: self.arena
        )
        self.blocks = BlockPool(num_blocks, BLOCK_SIZE, False, self.arena.blocks, self.arena.num_blocks)

    def write(self, blocks: Sequence[BlockId]) -> None:
        """Touches every byte of blocks, as the steps of a worker do."""
        pool = self.cache.pool
        for block in blocks:
            pool[block].fill_(float(block))


class Giver:
    """Offers legs, and gives their blocks away; `gave_s` is what it took the last time."""

    def __init__(self, pool: ArenaPool) -> None:
        self._pool = pool
        self._legs: dict[LegId, tuple[BlockId, ...]] = {}
        self.gave_s = 0.0

    def prepare(self, leg_id: LegId, count: int) -> tuple[BlockId, ...]:
        """A leg of so many written blocks."""
        table = self._legs[leg_id] = self._pool.blocks.allocate(count)
        self._pool.write(table)
        return table

    def give(self, leg_id: LegId, taker: int, given: Sequence[BlockId], taken: Sequence[BlockId]) -> bool:
        """See KvGiver."""
        before_s = self._pool.arena.seconds
        with self._pool.arena.timed():
            pairs = self._pool.arena.give(taker, given, taken)
            self._pool.blocks.exchange(pairs)
            self._legs[leg_id] = tuple(came for _, came in pairs)
        self.gave_s = self._pool.arena.seconds - before_s
        return bool(pairs)

    def released(self, key: HandoffKey, _reason: ReleaseReason) -> None:
        """An offer is over."""
        self._pool.blocks.release(self._legs.pop(key.leg_id))


async def _serve(path: Path, num_blocks: int) -> None:
    async with AsyncExitStack() as stack:
        pool = ArenaPool(path, num_blocks)
        stack.callback(pool.cache.close)
        pool.write(pool.arena.blocks)
        giver = Giver(pool)
        me = WorkerRecord(WorkerId("giver"), Incarnation(1), Role.PREFILL, "", DIGEST)
        source = HandoffSource(*(me, pool.cache, ADOPTING, time.monotonic, giver.released), giver=giver)
        record = await stack.enter_async_context(sourced(source))
        print(RECORD.dump_json(record).decode(), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            count, name = line.split()
            source.offer(HandoffKey(LegId(name), 1), giver.prepare(LegId(name), int(count)))
            print(giver.gave_s, flush=True)


def main() -> None:
    """Serves until stdin ends."""
    # Answers alone go to stdout.
    configure_logging(logging.WARNING)
    torch.set_num_threads(1)
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2])))


if __name__ == "__main__":
    main()
