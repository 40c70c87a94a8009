"""Seeded schedules of faults over real transports: no wrong byte, no leaked block, no overrun."""

import asyncio
import os
import random
import threading
import time

import pytest

from kvtransfer.contract import BlockMemory, BlockRange, KvReady, SinkTransport, SourceTransport
from kvtransfer.faults import Fault, FaultSchedule, FaultySink, FaultySource
from tandem.errors import TransferError
from tandem.ids import BlockId
from tests.kvtransfer.coding import Coding, coding
from tests.kvtransfer.pair import Pair, config, connected_pair, key

NUM_BLOCKS = 48
BLOCK_BYTES = 16 * 1024
HANDOFFS = 20
AT_ONCE = 5
PULL_S = 3.0
"""The deadline of a pull; none may end much later."""

LATE_S = 0.5
"""How much later, on a machine whose cores are busy."""

WEIGHTS = {
    Fault.NONE: 4.0,
    Fault.DELAY: 1.0,
    Fault.DROP: 0.5,
    Fault.TRUNCATE: 1.0,
    Fault.CORRUPT: 1.0,
    Fault.REORDER: 1.0,
    Fault.DISCONNECT: 1.0,
}
CODECS = ("fp8", "int8", "oaken")
CODED_EVERY = 5
SCHEDULES = 2000
TOGETHER = 10
"""Schedules in one event loop: most of one's time is waiting."""

COMMON = 500
"""Schedules of the unit run, a minute or so on two cores; the others are for `make soak`."""

FIRSTS = [
    first if first < COMMON else pytest.param(first, marks=pytest.mark.soak)
    for first in range(0, SCHEDULES, TOGETHER)
]


async def hand_over(pair: Pair, leg: str, given: list[BlockId], targets: list[BlockId]) -> bool:
    """Whether the leg arrived, in time; if it did, its bytes are right."""
    began_s = time.monotonic()
    try:
        await pair.pull(key(leg), BlockRange(0, len(given)), targets, remaining_s=PULL_S)
    except TransferError:
        return False
    finally:
        assert time.monotonic() - began_s < PULL_S + LATE_S
    assert pair.sink_pool.read(targets) == pair.expected(given)
    return True


async def hand_over_growing(
    pair: Pair, leg: str, given: list[BlockId], targets: list[BlockId], chance: random.Random
) -> bool:
    """The same, with the offer growing meanwhile (or whole, for every other leg)."""
    states = [KvReady(0, 0), KvReady(3, 0), KvReady(5, 0), KvReady(5, 3), KvReady(8, 4)]
    whole = chance.random() < 0.5
    pair.source.offer(key(leg), given, None if whole else states[0])
    pulling = asyncio.create_task(hand_over(pair, leg, given, targets))
    for ready in states[1:] if not whole else ():
        await asyncio.sleep(chance.random() * 0.01)
        pair.source.advance(key(leg), ready)
    return await pulling


@pytest.mark.parametrize("first", FIRSTS)
async def test_faults_cost_time_but_never_bytes_or_blocks(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.handoffs.pieces.MIN_PIECE_BYTES", 2 * BLOCK_BYTES)
    async with asyncio.TaskGroup() as group:
        for seed in range(first, first + TOGETHER):
            group.create_task(run_schedule(seed), name=f"seed {seed}")


async def run_schedule(seed: int) -> None:
    """All hand-offs of one schedule; what fails in it names the seed."""
    try:
        await hand_over_all(seed)
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


def coding_of(seed: int) -> Coding | None:
    """Every fifth schedule has a codec, one after the other."""
    turn, rest = divmod(seed, CODED_EVERY)
    return None if rest else coding(CODECS[turn % len(CODECS)], BLOCK_BYTES)


async def hand_over_all(seed: int) -> None:
    """Twenty hand-offs over transports that fail by the seed, and what must hold after them."""
    chance = random.Random(seed)

    def wrap_sink(inner: SinkTransport, pool: BlockMemory) -> SinkTransport:
        return FaultySink(inner, pool, FaultSchedule(chance.randrange(1 << 30), WEIGHTS, delay_s=0.01))

    def wrap_source(inner: SourceTransport) -> SourceTransport:
        return FaultySource(inner, FaultSchedule(chance.randrange(1 << 30), WEIGHTS, delay_s=0.01))

    names = chance.choice((("shm", "tcp"), ("tcp", "shm"), ("shm",), ("tcp",)))
    times = {"lease_s": 0.3, "connect_timeout_s": 0.3, "fence_margin_s": 0.05, "regrasp_s": 0.1}
    settings = config(*names, **times, stall_s=0.1, backoff_s=0.02)
    async with connected_pair(
        settings, NUM_BLOCKS, BLOCK_BYTES, wrap_sink, wrap_source, coding=coding_of(seed)
    ) as pair:
        order = [BlockId(block) for block in range(NUM_BLOCKS)]
        chance.shuffle(order)
        guard = [BlockId(block) for block in range(8 * AT_ONCE, NUM_BLOCKS)]
        before = pair.sink_pool.read(guard)
        for first in range(0, HANDOFFS, AT_ONCE):
            async with asyncio.TaskGroup() as group:
                for slot in range(AT_ONCE):
                    targets = [BlockId(block) for block in range(8 * slot, 8 * slot + 8)]
                    given = order[8 * slot : 8 * slot + 8]
                    leg = f"leg-{first + slot}"
                    group.create_task(hand_over_growing(pair, leg, given, targets, chance))
            await pair.wait_released(first + AT_ONCE, within_s=2.0)
        assert pair.sink_pool.read(guard) == before
        assert len({name for name, _ in pair.released}) == len(pair.released) == HANDOFFS
        counts = pair.source.counts()
        assert counts.in_flight == counts.parked == 0
        assert counts.committed + sum(counts.aborted.values()) == HANDOFFS


async def test_pairs_leave_no_descriptor_and_no_thread() -> None:
    async def once() -> None:
        def wrap(inner: SinkTransport, pool: BlockMemory) -> SinkTransport:
            return FaultySink(inner, pool, FaultSchedule(3, {Fault.NONE: 1.0, Fault.DISCONNECT: 1.0}))

        async with connected_pair(config("shm", "tcp"), NUM_BLOCKS, 4096, wrap) as pair:
            blocks = [BlockId(block) for block in range(8)]
            for leg in range(6):
                pair.source.offer(key(f"leg-{leg}"), blocks)
                await hand_over(pair, f"leg-{leg}", blocks, blocks)

    await once()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        await once()
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
