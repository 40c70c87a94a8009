"""Edge: the giving side of the nccl transport over the fake NCCL, in a process of its own that can be killed.

Prints the address, then serves one transfer whose bytes never come.
"""

import asyncio
import signal

from kvtransfer.contract import BlockRange, Transfer
from kvtransfer.nccl.source import NcclSource
from tests.kvtransfer.fake_nccl import DevicePoolInHost, FakeNccl, Mischief, host_kit
from tests.kvtransfer.nccl_pair import BLOCK_BYTES, SINK, TICKET
from tests.kvtransfer.pair import blocks, config, key

TRANSFER = Transfer(key("a"), 1, BlockRange(0, 4))


async def serve() -> None:
    """Until the process is killed."""
    pool = DevicePoolInHost(8, BLOCK_BYTES)
    source = NcclSource(pool, config("nccl"), host_kit(FakeNccl(Mischief(send_nothing=True))))
    await source.start(lambda _peer: None, lambda _fault: None)
    print(source.endpoint(SINK, TICKET), flush=True)
    await source.send(SINK, TRANSFER, blocks(0, 1, 2, 3), 0, BLOCK_BYTES)


if __name__ == "__main__":
    signal.alarm(60)
    asyncio.run(serve())
