"""Fifty seeded schedules of faults over real transports: no wrong byte, no leaked block, no overrun."""

import asyncio
import os
import random
import threading

import pytest

from kvtransfer.contract import BlockRange, SinkTransport, SourceTransport
from kvtransfer.faults import Fault, FaultSchedule, FaultySink, FaultySource
from tandem.errors import TransferError
from tandem.ids import BlockId
from tests.kvtransfer.pair import Pair, Pool, config, connected_pair, key

NUM_BLOCKS = 48
WEIGHTS = {
    Fault.NONE: 4.0,
    Fault.DELAY: 1.0,
    Fault.DROP: 0.5,
    Fault.TRUNCATE: 1.0,
    Fault.CORRUPT: 1.0,
    Fault.DISCONNECT: 1.0,
}


async def hand_over(pair: Pair, leg: str, given: list[BlockId], targets: list[BlockId]) -> bool:
    """Whether the leg arrived; if it did, its bytes are right."""
    pair.source.offer(key(leg), given)
    try:
        await pair.pull(key(leg), BlockRange(0, len(given)), targets)
    except TransferError:
        return False
    assert pair.sink_pool.read(targets) == pair.source_pool.read(given)
    return True


@pytest.mark.parametrize("seed", range(50))
async def test_faults_cost_time_but_never_bytes_or_blocks(seed: int) -> None:
    chance = random.Random(seed)

    def wrap_sink(inner: SinkTransport, pool: Pool) -> SinkTransport:
        return FaultySink(inner, pool, FaultSchedule(chance.randrange(1 << 30), WEIGHTS, delay_s=0.01))

    def wrap_source(inner: SourceTransport) -> SourceTransport:
        return FaultySource(inner, FaultSchedule(chance.randrange(1 << 30), WEIGHTS, delay_s=0.01))

    names = chance.choice((("shm", "tcp"), ("tcp", "shm"), ("shm",), ("tcp",)))
    settings = config(*names, lease_s=0.15, connect_timeout_s=0.3, fence_margin_s=0.05, regrasp_s=0.1)
    async with connected_pair(settings, NUM_BLOCKS, 4096, wrap_sink, wrap_source) as pair:
        order = [BlockId(block) for block in range(NUM_BLOCKS)]
        chance.shuffle(order)
        guard = [BlockId(block) for block in range(40, NUM_BLOCKS)]
        before = pair.sink_pool.read(guard)
        async with asyncio.TaskGroup() as group:
            for leg in range(5):
                given = order[8 * leg : 8 * leg + 8]
                targets = [BlockId(block) for block in range(8 * leg, 8 * leg + 8)]
                group.create_task(hand_over(pair, f"leg-{leg}", given, targets))
        assert pair.sink_pool.read(guard) == before
        await pair.wait_released(5, within_s=2.0)
        assert len({name for name, _ in pair.released}) == len(pair.released) == 5
        counts = pair.source.counts()
        assert counts.in_flight == counts.parked == 0
        assert counts.committed + sum(counts.aborted.values()) == 5


async def test_pairs_leave_no_descriptor_and_no_thread() -> None:
    async def once() -> None:
        def wrap(inner: SinkTransport, pool: Pool) -> SinkTransport:
            return FaultySink(inner, pool, FaultSchedule(3, {Fault.NONE: 1.0, Fault.DISCONNECT: 1.0}))

        async with connected_pair(config("shm", "tcp"), NUM_BLOCKS, 4096, wrap) as pair:
            blocks = [BlockId(block) for block in range(8)]
            for leg in range(6):
                await hand_over(pair, f"leg-{leg}", blocks, blocks)

    await once()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        await once()
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
