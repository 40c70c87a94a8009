"""Edge: `tandem bench kv`: hand-offs as a decode worker makes them, while other processes compute.

The decode worker's own scheduler reserves the blocks that the KV is pulled into, and there is room: what a
hand-off waits for beyond that is the load, not the hand-off.
"""

import itertools
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Final

from benchmarks.kv_layouts import BLOCK_SIZE, SMOLLM2_BLOCKS, SOURCE_STEP, Layout, Placement
from benchmarks.kv_pulls import Puller, opened
from benchmarks.kv_times import HandoffTimes, Road, Timed
from benchmarks.processes import exchange, running_module
from decode_worker.scheduler import DecodeLeg, DecodeScheduler, SampleStart
from engine.kv.blocks import BlockPool
from tandem.ids import LegId
from tandem.sampling import SamplingParams

HANDOFF: Final = Layout(SMOLLM2_BLOCKS, Placement.SCATTERED, (10,))
"""A hand-off as the Azure trace makes them here: 160 tokens of SmolLM2, 7.4 MB."""


async def measured_handoffs(roads: Sequence[Road], pulls: int) -> HandoffTimes:
    """So many hand-offs over every road, in turns, beside a busy process for each core, after a first one.

    Raises TandemError.
    """
    busy = os.cpu_count() or 1
    async with AsyncExitStack() as stack:
        for _ in range(busy):
            await exchange(await stack.enter_async_context(running_module("benchmarks.busy_core")), b"")
        puller = await stack.enter_async_context(opened(HANDOFF, roads))
        receiver = _Receiver(puller)
        times: dict[Road, list[Timed]] = {road: [] for road in roads}
        for _ in range(pulls + 1):
            for road, found in times.items():
                found.append(await receiver.hand_over(road))
    return HandoffTimes(HANDOFF, busy, {road: tuple(found[1:]) for road, found in times.items()})


class _Receiver:
    """What a decode worker does about one leg, from StartDecode until it may join the batch."""

    def __init__(self, puller: Puller) -> None:
        (blocks,) = HANDOFF.counts
        self._tokens = blocks * BLOCK_SIZE
        self._puller = puller
        self._given = HANDOFF.blocks(blocks, SOURCE_STEP)
        # Every prompt is new, so nothing would be found in a prefix cache.
        pool = BlockPool(HANDOFF.pool_blocks, BLOCK_SIZE, prefix_cache=False)
        self._scheduler = DecodeScheduler(
            pool, max_batch=8, max_waiting=8, context_tokens=2 * self._tokens, eos_ids=()
        )
        self._legs = itertools.count()

    async def hand_over(self, road: Road) -> Timed:
        """One leg; its blocks are free again afterwards."""
        name = LegId(f"received-{next(self._legs)}")
        began_s = time.perf_counter()
        samples = (SampleStart(0, (1,)),)
        leg = DecodeLeg(name, range(self._tokens), self._tokens, samples, SamplingParams(), 0, began_s + 60)
        self._scheduler.add(leg, began_s)
        (reservation,) = self._scheduler.reserve(time.perf_counter())
        reserve_s = time.perf_counter() - began_s
        pull = await self._puller.pull(road, self._given, reservation.target_blocks)
        self._scheduler.landed(name, time.perf_counter())
        self._scheduler.cancel(name, (0,))
        return Timed(pull.report, pull.pull_s, reserve_s)
