"""Edge: one side of a pair in a network namespace of its own; `ip netns exec` starts it.

`source HOST BLOCKS BLOCK_BYTES LEGS` offers all its blocks under each leg and prints its address.
`sink ADDRESS BLOCKS BLOCK_BYTES LEGS` pulls every leg, and prints the transport, or how its bytes differ.
"""

import asyncio
import signal
import sys
import time

from kvtransfer.contract import BlockRange, TransferConfig
from kvtransfer.handoffs.sink import HandoffSink
from tandem.ids import BlockId
from tandem.worker import Role
from tests.kvtransfer.pair import TOKEN, Pool, key, record, served_source

SEED = 1
TRANSPORTS = ("shm", "tcp")


async def serve(host: str, num_blocks: int, block_bytes: int, legs: int) -> None:
    """Until the process is killed."""
    pool = Pool(num_blocks, block_bytes)
    pool.fill(SEED)
    settings = TransferConfig(transports=TRANSPORTS, bind_host=host, advertise_host=host)
    async with served_source(pool, settings, []) as (source, me):
        for leg in range(legs):
            source.offer(key(f"leg-{leg}"), [BlockId(block) for block in range(num_blocks)])
        print(me.address, flush=True)
        await asyncio.Event().wait()


async def fetch(address: str, num_blocks: int, block_bytes: int, legs: int) -> None:
    """Pulls every leg and compares its bytes."""
    pool, original = Pool(num_blocks, block_bytes), Pool(num_blocks, block_bytes)
    original.fill(SEED)
    settings = TransferConfig(transports=TRANSPORTS)
    sink = HandoffSink(record("decode-0", Role.DECODE), pool, settings, time.monotonic, TOKEN)
    source = record("prefill-0", Role.PREFILL, address)
    targets = [BlockId(block) for block in reversed(range(num_blocks))]
    for leg in range(legs):
        pool.fill(SEED + 1)
        report = await sink.pull(key(f"leg-{leg}"), source, BlockRange(0, num_blocks), targets, 0, 20.0)
        same = pool.read(targets) == original.read(targets[::-1])
        print(report.transport if same else "bytes differ", flush=True)
    await sink.close()


def main() -> None:
    """Runs one side; never outlives its test by long."""
    signal.alarm(60)
    side, place, *sizes = sys.argv[1:]
    num_blocks, block_bytes, legs = map(int, sizes)
    asyncio.run((serve if side == "source" else fetch)(place, num_blocks, block_bytes, legs))


if __name__ == "__main__":
    main()
