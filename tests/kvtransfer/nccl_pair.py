"""Edge: both sides of the nccl transport in one process: a real link and a fake NCCL that moves bytes."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvtransfer.contract import BlockRange, PeerId, PullGrant, Transfer
from kvtransfer.nccl.communicator import CommunicatorLimits
from kvtransfer.nccl.sink import NcclSink
from kvtransfer.nccl.source import NcclSource
from tandem.errors import TransferFault
from tandem.ids import BlockId
from tandem.worker import Role
from tests.kvtransfer.fake_nccl import PATIENT, DevicePoolInHost, FakeNccl, Mischief, host_kit
from tests.kvtransfer.pair import config, key, record

SOURCE = PeerId.of(record("prefill-0", Role.PREFILL))
SINK = PeerId.of(record("decode-0", Role.DECODE))
TICKET = b"t" * 32
BLOCK_BYTES = 8192


@dataclass(slots=True)
class NcclPair:
    """Two pools of known bytes and the transports between them; what it told is in `lost` and `refused`."""

    source_pool: DevicePoolInHost
    sink_pool: DevicePoolInHost
    source: NcclSource
    sink: NcclSink
    source_nccl: FakeNccl
    sink_nccl: FakeNccl
    lost: list[PeerId] = field(default_factory=list)
    refused: list[TransferFault] = field(default_factory=list)
    numbers: int = 0

    async def connect(self, sink: PeerId = SINK) -> str:
        """As HandoffSink does; returns the address."""
        address = self.source.endpoint(sink, TICKET)
        assert address is not None
        await self.sink.connect(SOURCE, address, TICKET, BLOCK_BYTES)
        return address

    async def move(
        self,
        given: Sequence[BlockId],
        target: Sequence[BlockId],
        part: tuple[int, int] = (0, BLOCK_BYTES),
        lease_s: float = 5.0,
        sink: PeerId = SINK,
    ) -> None:
        """One granted transfer, both sides at one time; raises what the sink raises."""
        self.numbers += 1
        transfer = Transfer(key(f"leg-{self.numbers}"), self.numbers, BlockRange(0, len(given)))
        offset, size = part
        until_s = time.monotonic() + lease_s
        grant = PullGrant(transfer, tuple(given), offset, size, len(given) * size, until_s)
        sending = asyncio.create_task(self.source.send(sink, transfer, given, offset, size))
        try:
            await self.sink.receive(SOURCE, grant, target)
        finally:
            sending.cancel()
            await asyncio.wait((sending,), timeout=5)


@asynccontextmanager
async def nccl_pair(
    source_mischief: Mischief | None = None,
    sink_mischief: Mischief | None = None,
    limits: CommunicatorLimits = PATIENT,
    old: bool = False,
    connect_timeout_s: float = 30.0,
) -> AsyncIterator[NcclPair]:
    """Closed at the end, whatever hangs released first; `connect_timeout_s` is both sides'."""
    source_pool, sink_pool = DevicePoolInHost(32, BLOCK_BYTES), DevicePoolInHost(32, BLOCK_BYTES)
    source_pool.fill(1)
    sink_pool.fill(2)
    source_nccl, sink_nccl = FakeNccl(source_mischief, old), FakeNccl(sink_mischief, old)
    settings = config("nccl", connect_timeout_s=connect_timeout_s)
    source = NcclSource(source_pool, settings, host_kit(source_nccl, limits))
    sink = NcclSink(sink_pool, settings, time.monotonic, host_kit(sink_nccl, limits))
    pair = NcclPair(source_pool, sink_pool, source, sink, source_nccl, sink_nccl)
    await source.start(pair.lost.append, pair.refused.append)
    try:
        yield pair
    finally:
        source_nccl.mischief.release.set()
        sink_nccl.mischief.release.set()
        await sink.close()
        await source.close()
        source_pool.close()
        sink_pool.close()
