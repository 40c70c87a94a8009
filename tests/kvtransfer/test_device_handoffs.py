"""Whole hand-offs over the roads of device memory, beside tcp: fallback, return, and what dies."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from kvtransfer.contract import BlockRange, SinkTransport, SourceTransport, TransferConfig
from kvtransfer.cuda_ipc import CudaIpcSink, CudaIpcSource, IpcKit
from kvtransfer.handoff import ReleaseReason
from kvtransfer.nccl_sink import NcclSink
from kvtransfer.nccl_source import NcclSource
from kvtransfer.sink import HandoffSink
from kvtransfer.tcp_sink import TcpSink
from kvtransfer.tcp_source import TcpSource
from tandem.worker import Role
from tests.kvtransfer.fake_nccl import DevicePoolInHost, FakeNccl, HostDevice, host_kit
from tests.kvtransfer.pair import TOKEN, Pair, blocks, config, key, record, served_source
from tests.kvtransfer.test_cuda_ipc import HostSharing

Makers = tuple[
    Callable[[DevicePoolInHost, TransferConfig], SourceTransport],
    Callable[[DevicePoolInHost, TransferConfig], SinkTransport],
]
GIVEN, TARGETS = blocks(7, 8, 9, 3, 30, 0), blocks(1, 2, 3, 20, 5, 11)


@asynccontextmanager
async def device_pair(makers: Makers, settings: TransferConfig) -> AsyncIterator[Pair]:
    """A source and a sink with device pools, one road of device memory, and tcp."""
    source_pool, sink_pool = DevicePoolInHost(32, 8192), DevicePoolInHost(32, 8192)
    source_pool.fill(1)
    sink_pool.fill(2)
    giving = (makers[0](source_pool, settings), TcpSource(source_pool, settings))
    taking = (makers[1](sink_pool, settings), TcpSink(sink_pool, settings, time.monotonic))
    released: list[object] = []
    async with served_source(source_pool, settings, released, giving) as (source, at):  # type: ignore[arg-type]
        me = record("decode-0", Role.DECODE)
        sink = HandoffSink(me, sink_pool, settings, time.monotonic, TOKEN, transports=taking)
        try:
            yield Pair(source_pool, sink_pool, source, sink, at, released)  # type: ignore[arg-type]
        finally:
            await sink.close()
    source_pool.close()
    sink_pool.close()


def nccl_makers(source: FakeNccl, sink: FakeNccl) -> Makers:
    """Both sides over fakes."""
    return (
        lambda pool, settings: NcclSource(pool, settings, host_kit(source)),
        lambda pool, settings: NcclSink(pool, settings, time.monotonic, host_kit(sink)),
    )


def ipc_makers() -> Makers:
    """Both sides over fakes."""
    kit = IpcKit(lambda _index: HostDevice(), lambda _index: HostSharing())
    return (
        lambda pool, settings: CudaIpcSource(pool, settings, kit),
        lambda pool, settings: CudaIpcSink(pool, settings, time.monotonic, kit),
    )


@pytest.mark.parametrize("name", ["nccl", "cuda_ipc"])
async def test_handoff_is_committed_with_checksums(name: str) -> None:
    makers = nccl_makers(FakeNccl(), FakeNccl()) if name == "nccl" else ipc_makers()
    async with device_pair(makers, config(name, "tcp")) as pair:
        for number in range(3):
            pair.source.offer(key(f"leg-{number}"), GIVEN)
            report = await pair.pull(key(f"leg-{number}"), BlockRange(0, len(GIVEN)), TARGETS)
            assert report.transport == name
            assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(GIVEN)
            assert pair.released[-1] == (key(f"leg-{number}"), ReleaseReason.COMMITTED)


async def test_broken_communicator_is_replaced_by_tcp_and_a_new_epoch_returns_to_use() -> None:
    source_nccl, sink_nccl = FakeNccl(), FakeNccl()
    settings = replace(config("nccl", "tcp"), backoff_s=0.1, connect_timeout_s=1.0)
    async with device_pair(nccl_makers(source_nccl, sink_nccl), settings) as pair:

        async def road_of(leg: str) -> str:
            pair.source.offer(key(leg), GIVEN)
            report = await pair.pull(key(leg), BlockRange(0, len(GIVEN)), TARGETS)
            assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(GIVEN)
            return report.transport

        assert await road_of("before") == "nccl"
        source_nccl.mischief.async_status = 6
        began_s = time.monotonic()
        assert await road_of("during") == "tcp"
        assert time.monotonic() - began_s < 2.0
        source_nccl.mischief.async_status = 0
        roads = ["tcp"]
        async with asyncio.timeout(5):
            while roads[-1] == "tcp":
                roads.append(await road_of(f"after-{len(roads)}"))
        assert roads[-1] == "nccl"
        assert len(source_nccl.made) == 2
        assert source_nccl.aborted == source_nccl.made[:1]


async def test_sink_whose_nccl_cannot_open_takes_tcp_at_once_next_time() -> None:
    sink_nccl = FakeNccl()
    sink_nccl.mischief.open_status = 2
    settings = replace(config("nccl", "tcp"), connect_timeout_s=1.0)
    async with device_pair(nccl_makers(FakeNccl(), sink_nccl), settings) as pair:
        for number in range(2):
            pair.source.offer(key(f"leg-{number}"), GIVEN)
            report = await pair.pull(key(f"leg-{number}"), BlockRange(0, len(GIVEN)), TARGETS)
            assert report.transport == "tcp"
        assert report.move_s + report.accept_s < 0.5


async def test_wedged_transport_is_told() -> None:
    sink_nccl = FakeNccl()
    async with device_pair(nccl_makers(FakeNccl(), sink_nccl), config("nccl", "tcp")) as pair:
        pair.source.offer(key("a"), GIVEN)
        await pair.pull(key("a"), BlockRange(0, len(GIVEN)), TARGETS)
        assert pair.sink.communicators().open == 1
        assert pair.source.communicators().bytes > 0
        sink_nccl.mischief.hang_abort = True
        await pair.sink.peer_lost(pair.source_record.worker_id, pair.source_record.incarnation)
        assert pair.sink.communicators().wedged == "An NCCL abort hangs."
        sink_nccl.mischief.release.set()
