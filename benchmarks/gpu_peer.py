"""Edge: one side of a GPU check, in a process of its own so that it can be killed.

`source TRANSPORT BLOCKS BLOCK_BYTES OFFERS` offers the whole pool so many times and prints its address, then
a line for each offer that ended. `sink TRANSPORT BLOCKS BLOCK_BYTES ADDRESS` pulls the first offer, prints
"pulling" when its transfer begins, and never commits.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from benchmarks.gpu_pool import GpuPool
from kvtransfer.contract import (
    BlockRange,
    HandoffKey,
    OnLanded,
    PeerId,
    PullGrant,
    PullReport,
    SinkTransport,
    TransferConfig,
)
from kvtransfer.handoffs.service import HandoffServicer
from kvtransfer.handoffs.sink import HandoffSink
from kvtransfer.handoffs.source import HandoffSource
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.transports import sink_transports
from tandem import grpc_edge
from tandem.ids import BlockId, Incarnation, LegId, WorkerId
from tandem.v1.worker_pb2_grpc import add_HandoffServiceServicer_to_server
from tandem.worker import Role, WorkerRecord

TOKEN_ENV = "TANDEM_GPU_CHECK_TOKEN"  # noqa: S105
LEASE_S = 60.0
PULL_S = 60.0

Spec = tuple[str, int, int]
"""Transport, blocks, bytes of a block."""


def key(number: int) -> HandoffKey:
    """The hand-off of an offer."""
    return HandoffKey(LegId(f"check-{number}"), 1)


def config(transport: str) -> TransferConfig:
    """One road only, so that nothing else can hide its failure."""
    return TransferConfig(transports=(transport,), lease_s=LEASE_S, park_s=600.0, connect_timeout_s=20.0)


@asynccontextmanager
async def open_sink(
    spec: Spec, pool: GpuPool, transports: Sequence[SinkTransport] | None = None
) -> AsyncIterator[HandoffSink]:
    """A sink over a pool; `transports` instead of those by name."""
    me = WorkerRecord(WorkerId("check-sink"), Incarnation(1), Role.DECODE, "", "gpu-check")
    token = os.environ[TOKEN_ENV]
    sink = HandoffSink(me, pool, config(spec[0]), time.monotonic, token, transports=transports)
    try:
        yield sink
    finally:
        await sink.close()


async def pull(sink: HandoffSink, address: str, spec: Spec, number: int, order: list[BlockId]) -> PullReport:
    """Pulls an offer into blocks in this order."""
    source = WorkerRecord(WorkerId("check-source"), Incarnation(1), Role.PREFILL, address, "gpu-check")
    return await sink.pull(key(number), source, BlockRange(0, spec[1]), order, 0, PULL_S)


async def serve(spec: Spec, offers: int) -> None:
    """Until it is killed or its input ends."""
    transport, num_blocks, block_bytes = spec
    pool = GpuPool(num_blocks, block_bytes, seed=1)

    def released(ended: HandoffKey, reason: ReleaseReason) -> None:
        print(ended.leg_id, reason.value, flush=True)

    me = WorkerRecord(WorkerId("check-source"), Incarnation(1), Role.PREFILL, "", "gpu-check")
    source = HandoffSource(me, pool, config(transport), time.monotonic, released)
    await source.start()
    server = grpc_edge.server(os.environ[TOKEN_ENV])
    add_HandoffServiceServicer_to_server(HandoffServicer(source), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    for number in range(offers):
        source.offer(key(number), [BlockId(block) for block in range(num_blocks)])
    print(f"127.0.0.1:{port}", flush=True)
    try:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    finally:
        await source.close()
        await server.stop(grace=0)


class HoldingSink:
    """A taking side that keeps its lease when all is there."""

    def __init__(self, inner: SinkTransport) -> None:
        self._inner = inner
        self.name = inner.name
        self.connect = inner.connect
        self.disconnect = inner.disconnect
        self.close = inner.close

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """Says so, receives, and stays until it is cancelled."""
        print("pulling", flush=True)
        copy_s = await self._inner.receive(source, grant, target, on_landed)
        await asyncio.Event().wait()
        return copy_s


async def take(spec: Spec, address: str) -> None:
    """One pull, until the process is killed."""
    pool = GpuPool(spec[1], spec[2], seed=2)
    inner = sink_transports(pool, config(spec[0]), time.monotonic)
    async with open_sink(spec, pool, [HoldingSink(transport) for transport in inner]) as sink:
        await pull(sink, address, spec, 0, [BlockId(block) for block in range(spec[1])])


def main() -> None:
    """Runs one side."""
    side, transport, num_blocks, block_bytes, last = sys.argv[1:]
    spec = (transport, int(num_blocks), int(block_bytes))
    asyncio.run(serve(spec, int(last)) if side == "source" else take(spec, last))


if __name__ == "__main__":
    main()
