"""Edge: one side of a pair in a process of its own, so that tests can kill it.

`source BLOCKS BLOCK_BYTES TRANSPORT FAULT` serves one offer and prints its port.
`sink PORT BLOCKS BLOCK_BYTES TRANSPORT FAULT` pulls it and prints "granted" once the transfer is under way.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Sequence

from kvtransfer.contract import BlockRange, HandoffKey, OnLanded, PeerId, PullGrant, SinkTransport
from kvtransfer.faults import Fault, FaultSchedule, FaultySink, FaultySource
from kvtransfer.handoffs.sink import HandoffSink
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.transports import sink_transports, source_transports
from tandem.ids import BlockId
from tandem.worker import Role
from tests.kvtransfer.pair import TOKEN, Pool, config, key, record, served_source


class AnnouncingSink(FaultySink):
    """Prints a line when a transfer begins."""

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """As the base does, after the line."""
        print("granted", flush=True)
        return await super().receive(source, grant, target, on_landed)


async def serve(num_blocks: int, block_bytes: int, name: str, fault: Fault) -> None:
    """Until the process is killed."""
    pool = Pool(num_blocks, block_bytes)
    pool.fill(1)
    settings = config(name)
    giving = [
        FaultySource(inner, FaultSchedule(1, {fault: 1.0})) for inner in source_transports(pool, settings)
    ]
    released: list[tuple[HandoffKey, ReleaseReason]] = []
    async with served_source(pool, settings, released, giving) as (source, me):
        source.offer(key("a"), [BlockId(block) for block in range(num_blocks)])
        print(me.address, flush=True)
        await asyncio.Event().wait()


async def fetch(address: str, num_blocks: int, block_bytes: int, name: str, fault: Fault) -> None:
    """Pulls once."""
    pool = Pool(num_blocks, block_bytes)
    settings = config(name)

    def wrap(inner: SinkTransport) -> SinkTransport:
        return AnnouncingSink(inner, pool, FaultSchedule(1, {fault: 1.0}))

    taking = [wrap(inner) for inner in sink_transports(pool, settings, time.monotonic)]
    me = record("decode-0", Role.DECODE)
    sink = HandoffSink(me, pool, settings, time.monotonic, TOKEN, transports=taking)
    source = record("prefill-0", Role.PREFILL, address)
    targets = [BlockId(block) for block in range(num_blocks)]
    await sink.pull(key("a"), source, BlockRange(0, num_blocks), targets, 0, 30.0)


def main() -> None:
    """Runs one side; never outlives its test by long."""
    signal.alarm(60)
    side, *rest = sys.argv[1:]
    if side == "source":
        num_blocks, block_bytes, name, fault = rest
        asyncio.run(serve(int(num_blocks), int(block_bytes), name, Fault(fault)))
    else:
        address, num_blocks, block_bytes, name, fault = rest
        asyncio.run(fetch(address, int(num_blocks), int(block_bytes), name, Fault(fault)))


if __name__ == "__main__":
    main()
