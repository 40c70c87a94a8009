"""The cuda_ipc transport: the same code over host memory, with sharing that hands addresses on."""

import asyncio
import ctypes
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from kvtransfer.contract import BlockRange, PeerId, PullGrant, Transfer
from kvtransfer.cuda.driver import HANDLE_BYTES, CudaDriver, SharedMemory
from kvtransfer.cuda.ipc import CudaIpcSink, CudaIpcSource, IpcAddress, IpcKit
from tandem.errors import TransferError, TransferFault
from tandem.worker import Role
from tests.kvtransfer.fake_nccl import DevicePoolInHost, HostDevice, HostLane, ignore
from tests.kvtransfer.pair import Pool, blocks, config, eventually, key, outcome_of, record

SOURCE = PeerId.of(record("prefill-0", Role.PREFILL))
SINK = PeerId.of(record("decode-0", Role.DECODE))
TICKET = b"t" * 32
BLOCK_BYTES = 8192
GIVEN, TARGETS = blocks(7, 8, 9, 3, 30), blocks(1, 2, 3, 20, 5)


@dataclass(slots=True)
class HostSharing:
    """Handles carry an address of this process; what is mapped is counted."""

    mapped: list[int] = field(default_factory=list)
    refuses: bool = False

    def share(self, address: int) -> SharedMemory:
        """See MemorySharing; the allocation begins 4096 bytes before the pool."""
        if self.refuses:
            raise OSError("The KV pool cannot be shared with other processes: not supported.")
        return SharedMemory(struct.pack("Q56x", address - 4096), 4096)

    def map(self, handle: bytes) -> int:
        """See MemorySharing."""
        (address,) = struct.unpack("Q56x", handle)
        self.mapped.append(address)
        return int(address)

    def unmap(self, address: int) -> None:
        """See MemorySharing."""
        self.mapped.remove(address)


class SlowLane(HostLane):
    """Its copies begin only when they are let go; `begun` says that it waits for that."""

    def __init__(self, begun: threading.Event, release: threading.Event) -> None:
        super().__init__()
        self.enqueue(begun.set)
        self.enqueue(lambda: ignore(release.wait(10)))


@dataclass(slots=True)
class IpcPair:
    """Both sides in one process."""

    source_pool: DevicePoolInHost
    sink_pool: DevicePoolInHost
    source: CudaIpcSource
    sink: CudaIpcSink
    sharing: HostSharing
    lost: list[PeerId]

    async def connect(self) -> str:
        """As HandoffSink does."""
        address = self.source.endpoint(SINK, TICKET)
        assert address is not None
        await self.sink.connect(SOURCE, address, TICKET, BLOCK_BYTES)
        return address

    def grant(self, part: tuple[int, int] = (0, BLOCK_BYTES), lease_s: float = 5.0) -> PullGrant:
        """A lease on GIVEN."""
        transfer = Transfer(key("a"), 1, BlockRange(0, len(GIVEN)))
        return PullGrant(transfer, GIVEN, *part, len(GIVEN) * part[1], time.monotonic() + lease_s)


@asynccontextmanager
async def ipc_pair() -> AsyncIterator[IpcPair]:
    """Closed at the end."""
    source_pool, sink_pool = DevicePoolInHost(32, BLOCK_BYTES), DevicePoolInHost(32, BLOCK_BYTES)
    source_pool.fill(1)
    sink_pool.fill(2)
    sharing, lost = HostSharing(), list[PeerId]()
    kit = IpcKit(lambda _index: HostDevice(), lambda _index: sharing)
    source = CudaIpcSource(source_pool, config("cuda_ipc"), kit)
    sink = CudaIpcSink(sink_pool, config("cuda_ipc"), time.monotonic, kit)
    await source.start(lost.append, lambda _fault: None)
    try:
        yield IpcPair(source_pool, sink_pool, source, sink, sharing, lost)
    finally:
        await sink.close()
        await source.close()
        source_pool.close()
        sink_pool.close()


class TestCopies:
    """What arrives."""

    async def test_scattered_blocks_arrive_in_order_and_nothing_else_changes(self) -> None:
        async with ipc_pair() as pair:
            await pair.connect()
            others = [block for block in blocks(*range(32)) if block not in TARGETS]
            before = pair.sink_pool.read(others)
            await pair.sink.receive(SOURCE, pair.grant(), TARGETS)
            assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(GIVEN)
            assert pair.sink_pool.read(others) == before

    async def test_only_the_granted_part_of_each_block_is_written(self) -> None:
        async with ipc_pair() as pair:
            await pair.connect()
            before = pair.sink_pool.read(TARGETS)
            await pair.sink.receive(SOURCE, pair.grant(part=(4096, 512)), TARGETS)
            now, given = pair.sink_pool.read(TARGETS), pair.source_pool.read(GIVEN)
            for old, new, found in zip(before, given, now, strict=True):
                assert found == old[:4096] + new[4096:4608] + old[4608:]

    async def test_large_transfers_are_copied_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvtransfer.cuda.ipc.CHUNK_BYTES", 2 * BLOCK_BYTES)
        async with ipc_pair() as pair:
            await pair.connect()
            await pair.sink.receive(SOURCE, pair.grant(), TARGETS)
            assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(GIVEN)

    async def test_grant_beyond_the_pool_or_of_another_length_copies_nothing(self) -> None:
        async with ipc_pair() as pair:
            await pair.connect()
            before = pair.sink_pool.read(TARGETS)
            good = pair.grant()
            outside = PullGrant(
                good.transfer, blocks(7, 8, 9, 3, 32), 0, BLOCK_BYTES, good.length_bytes, good.lease_until_s
            )
            for grant, targets in ((outside, TARGETS), (good, TARGETS[:-1])):
                with pytest.raises(TransferError) as caught:
                    await pair.sink.receive(SOURCE, grant, targets)
                assert caught.value.fault is TransferFault.LENGTH
            assert pair.sink_pool.read(TARGETS) == before

    async def test_ended_lease_copies_nothing(self) -> None:
        async with ipc_pair() as pair:
            await pair.connect()
            before = pair.sink_pool.read(TARGETS)
            with pytest.raises(TransferError) as caught:
                await pair.sink.receive(SOURCE, pair.grant(lease_s=0.0), TARGETS)
            assert caught.value.fault is TransferFault.LEASE
            assert pair.sink_pool.read(TARGETS) == before


class TestPairs:
    """Handles are opened once, and closed."""

    async def test_pool_is_mapped_once_and_unmapped_before_the_link_ends(self) -> None:
        async with ipc_pair() as pair:
            await asyncio.gather(*(pair.connect() for _ in range(3)))
            assert len(pair.sharing.mapped) == 1
            unmap, order = pair.sharing.unmap, list[bool]()

            def seen(address: int) -> None:
                order.append(pair.lost == [])
                unmap(address)

            monkey = pytest.MonkeyPatch()
            monkey.setattr(HostSharing, "unmap", lambda _self, address: seen(address))
            await pair.sink.disconnect(SOURCE)
            monkey.undo()
            assert order == [True]
            assert pair.sharing.mapped == []
            await eventually(lambda: pair.lost == [SINK], within_s=10)

    async def test_dead_source_ends_the_pair(self) -> None:
        async with ipc_pair() as pair:
            await pair.connect()
            await pair.source.close()
            await eventually(lambda: pair.sink._mappings[SOURCE].lost, within_s=10)
            with pytest.raises(TransferError) as caught:
                await pair.sink.receive(SOURCE, pair.grant(), TARGETS)
            assert caught.value.fault is TransferFault.DISCONNECTED
            await pair.sink.disconnect(SOURCE)
            assert pair.sharing.mapped == []

    async def test_wrong_ticket_maps_nothing(self) -> None:
        async with ipc_pair() as pair:
            address = pair.source.endpoint(SINK, TICKET)
            assert address is not None
            with pytest.raises(TransferError) as caught:
                await pair.sink.connect(SOURCE, address, b"?" * 32, BLOCK_BYTES)
            assert caught.value.fault is TransferFault.REFUSED
            assert pair.sharing.mapped == []

    async def test_other_block_size_is_refused(self) -> None:
        async with ipc_pair() as pair:
            address = pair.source.endpoint(SINK, TICKET)
            assert address is not None
            with pytest.raises(TransferError) as caught:
                await pair.sink.connect(SOURCE, address, TICKET, BLOCK_BYTES * 2)
            assert caught.value.fault is TransferFault.LENGTH

    async def test_cancelled_copy_has_stopped_when_it_raises(self) -> None:
        async with ipc_pair() as pair:
            await pair.connect()
            begun, release = threading.Event(), threading.Event()
            lane = SlowLane(begun, release)
            mapping = pair.sink._mappings[SOURCE]
            mapping.lane = lane
            copying = asyncio.create_task(pair.sink.receive(SOURCE, pair.grant(), TARGETS))
            assert await asyncio.to_thread(begun.wait, 10)
            await eventually(lambda: bool(mapping.watches), within_s=10)
            (watch,) = mapping.watches
            copying.cancel()
            await eventually(watch._stopped.is_set, within_s=10)
            assert not copying.done()
            release.set()
            await asyncio.wait((copying,), timeout=10)
            assert copying.cancelled()
            marks = [bytes(8)] * len(TARGETS)
            for target in TARGETS:
                pair.sink_pool.view(target)[:8] = bytes(8)
            await lane.emptied()
            assert [bytes(pair.sink_pool.view(target)[:8]) for target in TARGETS] == marks


class TestAbsence:
    """Why a machine cannot do it."""

    async def test_source_says_why(self) -> None:
        host, device = Pool(2, BLOCK_BYTES), DevicePoolInHost(2, BLOCK_BYTES)
        kit = IpcKit(lambda _index: HostDevice(), lambda _index: HostSharing(refuses=True))
        with pytest.raises(OSError, match="not on a GPU"):
            await CudaIpcSource(host, config("cuda_ipc"), kit).start(lambda _peer: None, lambda _fault: None)
        refused = CudaIpcSource(device, config("cuda_ipc"), kit)
        with pytest.raises(OSError, match="cannot be shared"):
            await refused.start(lambda _peer: None, lambda _fault: None)
        assert refused.endpoint(SINK, TICKET) is None
        host.close()
        device.close()

    @pytest.mark.parametrize(
        "address", ["", "l 00 0 1", f"l {'0' * 128} -1 4", f"l {'0' * 128} 0 0", "l x 0 1"]
    )
    def test_address_that_makes_no_sense_is_refused(self, address: str) -> None:
        with pytest.raises(TransferError) as caught:
            IpcAddress.parse(address)
        assert caught.value.fault is TransferFault.UNSUPPORTED


class FakeDriver:
    """libcuda as far as it is used: writes where ctypes says, by the signatures of cuda.h."""

    def __init__(self, failing: str = "") -> None:
        self._failing = failing
        self.entered = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            self.entered += name == "cuCtxSetCurrent"
            if name == self._failing:
                return 801
            outputs = [getattr(argument, "_obj", None) for argument in arguments]
            if name == "cuMemGetAddressRange_v2":
                outputs[0].value, outputs[1].value = 0x7000, 1 << 20  # type: ignore[union-attr]
            if name == "cuIpcGetMemHandle":
                ctypes.memset(ctypes.addressof(outputs[0]), 7, HANDLE_BYTES)  # type: ignore[arg-type]
            if name == "cuIpcOpenMemHandle_v2":
                assert bytes(arguments[1]) == b"\7" * HANDLE_BYTES  # type: ignore[call-overload]
                outputs[0].value = 0x9000  # type: ignore[union-attr]
            if name == "cuGetErrorString":
                outputs[1].value = b"operation not supported"  # type: ignore[union-attr]
            return 0

        return call


class TestDriver:
    """What is made of the driver's answers."""

    def test_handle_and_offset_come_from_the_allocation(self) -> None:
        library = FakeDriver()
        driver = CudaDriver(library, 0)
        shared = driver.share(0x7100)
        assert shared == SharedMemory(b"\7" * HANDLE_BYTES, 0x100)
        assert driver.map(shared.handle) == 0x9000
        driver.unmap(0x9000)
        assert library.entered == 3

    @pytest.mark.parametrize("failing", ["cuMemGetAddressRange_v2", "cuIpcGetMemHandle"])
    def test_memory_without_a_handle_is_a_sentence(self, failing: str) -> None:
        with pytest.raises(OSError, match="operation not supported"):
            CudaDriver(FakeDriver(failing), 0).share(0x7100)

    def test_memory_that_cannot_be_mapped_is_a_transfer_error(self) -> None:
        with pytest.raises(TransferError) as caught:
            CudaDriver(FakeDriver("cuIpcOpenMemHandle_v2"), 0).map(b"\7" * HANDLE_BYTES)
        assert caught.value.fault is TransferFault.UNSUPPORTED

    def test_device_that_cannot_be_had_is_a_sentence(self) -> None:
        failure = None
        try:
            CudaDriver(FakeDriver("cuDevicePrimaryCtxRetain"), 3)
        except OSError as error:
            failure = error
        assert "cannot use device 3" in str(failure)

    async def test_outcome_of_a_short_handle(self) -> None:
        failure = await outcome_of(asyncio.to_thread(CudaDriver(FakeDriver(), 0).map, b"short"))
        assert isinstance(failure, TransferError)
