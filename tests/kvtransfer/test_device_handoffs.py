"""Whole hand-offs over the roads of device memory, beside tcp: fallback, return, and what dies."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from kvtransfer.contract import BlockRange, TransferConfig
from kvtransfer.handoffs.sink import HandoffSink
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.hashing import hashers
from kvtransfer.tcp.sink import TcpSink
from kvtransfer.tcp.source import TcpSource
from tandem.errors import TransferError
from tandem.worker import Role
from tests.kvtransfer.device_roads import Makers, checksums_in_host, ipc_makers, nccl_makers
from tests.kvtransfer.fake_nccl import PATIENT, DevicePoolInHost, FakeNccl, HostDevice
from tests.kvtransfer.pair import TOKEN, Pair, Pool, blocks, config, key, record, served_source


def opened(_index: int) -> HostDevice:
    """The device of every pool here."""
    return HostDevice()


GIVEN, TARGETS = blocks(7, 8, 9, 3, 30, 0), blocks(1, 2, 3, 20, 5, 11)


@pytest.fixture(autouse=True)
def kernel_in_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of hashing is as on a device."""
    monkeypatch.setattr("kvtransfer.cuda.device.device_checksums", checksums_in_host)


@asynccontextmanager
async def device_pair(makers: Makers, settings: TransferConfig) -> AsyncIterator[Pair]:
    """A source and a sink with device pools, one road of device memory, and tcp."""
    source_pool, sink_pool = DevicePoolInHost(32, 8192), DevicePoolInHost(32, 8192)
    source_pool.fill(1)
    sink_pool.fill(2)
    giving = (makers[0](source_pool, settings), TcpSource(source_pool, settings, opened))
    taking = (makers[1](sink_pool, settings), TcpSink(sink_pool, settings, time.monotonic, opened))
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


@pytest.mark.parametrize("name", ["nccl", "cuda_ipc"])
async def test_handoff_is_committed_with_checksums(name: str) -> None:
    makers = nccl_makers(FakeNccl(), FakeNccl()) if name == "nccl" else ipc_makers()
    async with device_pair(makers, config(name, "tcp", connect_timeout_s=30.0)) as pair:
        for number in range(3):
            pair.source.offer(key(f"leg-{number}"), GIVEN)
            report = await pair.pull(key(f"leg-{number}"), BlockRange(0, len(GIVEN)), TARGETS)
            assert report.transport == name
            assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(GIVEN)
            assert pair.released[-1] == (key(f"leg-{number}"), ReleaseReason.COMMITTED)


async def test_broken_communicator_is_replaced_by_tcp_and_a_new_epoch_returns_to_use() -> None:
    source_nccl, sink_nccl = FakeNccl(), FakeNccl()
    settings = replace(config("nccl", "tcp"), backoff_s=0.1, connect_timeout_s=30.0)
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
    makers = nccl_makers(FakeNccl(), sink_nccl, replace(PATIENT, abort_s=0.4))
    async with device_pair(makers, config("nccl", "tcp", connect_timeout_s=30.0)) as pair:
        pair.source.offer(key("a"), GIVEN)
        await pair.pull(key("a"), BlockRange(0, len(GIVEN)), TARGETS)
        assert pair.sink.communicators().open == 1
        assert pair.source.communicators().bytes > 0
        sink_nccl.mischief.hang_abort = True
        await pair.sink.peer_lost(pair.source_record.worker_id, pair.source_record.incarnation)
        assert pair.sink.communicators().wedged == "An NCCL abort hangs."
        sink_nccl.mischief.release.set()


async def test_wrong_bytes_on_the_device_are_seen_and_pulled_again() -> None:
    sink_nccl = FakeNccl()
    async with device_pair(nccl_makers(FakeNccl(), sink_nccl), config("nccl", "tcp")) as pair:
        pair.source.offer(key("a"), GIVEN)
        inner = pair.sink._transports["nccl"]
        receive = inner.receive

        async def spoilt(*arguments: object) -> float:
            copy_s = await receive(*arguments)  # type: ignore[arg-type]
            pair.sink_pool.view(TARGETS[2])[5] ^= 1
            return copy_s

        inner.receive = spoilt  # type: ignore[assignment, method-assign]
        report = await pair.pull(key("a"), BlockRange(0, len(GIVEN)), TARGETS)
        assert report.transport == "tcp"
        assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(GIVEN)


def test_host_and_device_have_a_checksum_in_common_and_agree_on_it() -> None:
    host, device = Pool(8, 4096), DevicePoolInHost(8, 4096)
    host.fill(3)
    device.fill(3)
    assert list(hashers(host)) == ["xxh3_64", "wsum64"]
    assert list(hashers(device)) == ["wsum64"]
    some = blocks(3, 0, 5)
    assert hashers(host)["wsum64"].sums(some, 1024, 512) == hashers(device)["wsum64"].sums(some, 1024, 512)
    assert hashers(host)["xxh3_64"].sums(some, 0, 4096) != hashers(host)["wsum64"].sums(some, 0, 4096)
    for hasher in (*hashers(host).values(), *hashers(device).values()):
        with pytest.raises(TransferError, match="stopped"):
            hasher.sums(some, 0, 4096, lambda: True)
    host.close()
    device.close()
