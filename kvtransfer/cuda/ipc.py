"""Edge: the cuda_ipc transport: a sink on the same host maps the source's pool and copies device to device.

The pool's handle travels in the answer to Connect. A unix socket stays open as the pair's link: the kernel
closes it when a process is gone, which is how each side knows of the other's end.
"""

import asyncio
import secrets
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from kvtransfer import links
from kvtransfer.contract import (
    BlockMemory,
    OnLanded,
    OnRefused,
    PeerId,
    PullGrant,
    Transfer,
    TransferConfig,
)
from kvtransfer.cuda.driver import HANDLE_BYTES, MemorySharing
from kvtransfer.device import Device, DevicePool, Lane, Mark, PieceCopy, Pieces
from kvtransfer.listener import LinkListener
from kvtransfer.nccl.pack_plan import Chunk, chunks
from kvtransfer.tcp import framing
from kvtransfer.threads import outlast, run_to_end, timed, to_its_end
from kvtransfer.turns import Turns
from kvtransfer.watch import Watch, outwait, wait_for
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

CHUNK_BYTES: Final = 256 * 1024 * 1024
"""Bytes copied between two looks at the lease: under a millisecond over NVLink, ten over PCIe."""

QUIET_S: Final = 1.0
"""Bound of the chunks that are under way when a copy is stopped."""


@dataclass(frozen=True, slots=True)
class IpcKit:
    """What a worker needs: how to use a device, and how to share its memory."""

    open_device: Callable[[int], Device]
    open_sharing: Callable[[int], MemorySharing]


@dataclass(frozen=True, slots=True)
class IpcAddress:
    """The source's link and its pool as another process can map it."""

    link: str
    handle: bytes
    offset_bytes: int
    num_blocks: int

    def encode(self) -> str:
        """The inverse of parse."""
        return f"{self.link} {self.handle.hex()} {self.offset_bytes} {self.num_blocks}"

    @classmethod
    def parse(cls, text: str) -> "IpcAddress":
        """Raises TransferError (UNSUPPORTED) for what no source of ours would send."""
        try:
            link, handle, offset_bytes, num_blocks = text.split(" ")
            made = cls(link, bytes.fromhex(handle), int(offset_bytes), int(num_blocks))
        except ValueError as error:
            raise TransferError(TransferFault.UNSUPPORTED, "The cuda_ipc address makes no sense.") from error
        if len(made.handle) != HANDLE_BYTES or made.offset_bytes < 0 or made.num_blocks < 1:
            raise TransferError(TransferFault.UNSUPPORTED, "The cuda_ipc address is out of bounds.")
        return made


class CudaIpcSource:
    """Lets sinks of the same user on the same host map this worker's pool."""

    name = "cuda_ipc"
    direct = True
    same_host = True

    def __init__(self, memory: BlockMemory, config: TransferConfig, kit: IpcKit) -> None:
        self._memory = memory
        self._kit = kit
        self._listener = LinkListener(config.connect_timeout_s, self._serve)
        self._address: str | None = None

    async def start(self, on_link_lost: Callable[[PeerId], None], on_refused: OnRefused) -> None:
        """Raises OSError, saying why, when the pool is not on a GPU or cannot be shared."""
        pool = DevicePool.of(self._memory)
        self._kit.open_device(pool.device_index)
        shared = self._kit.open_sharing(pool.device_index).share(pool.address)
        link = f"tandem-kv-ipc-{secrets.token_hex(16)}"
        listener = links.listening_as(link)
        self._address = IpcAddress(link, shared.handle, shared.offset_bytes, pool.num_blocks).encode()
        self._listener.start(listener, on_link_lost, on_refused)

    def endpoint(self, sink: PeerId, ticket: bytes) -> str | None:
        """Link and handle; None when the pool is not shared."""
        if self._address is not None:
            self._listener.admit(sink, ticket)
        return self._address

    def forget(self, sink: PeerId) -> None:
        """See SourceTransport."""
        self._listener.forget(sink)

    async def send(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """Nothing to do: the sink reads."""

    async def close(self) -> None:
        """Cuts all links; a sink that still copies notices."""
        await self._listener.close()

    async def _serve(self, connection: socket.socket, sink: PeerId) -> None:
        loop = asyncio.get_running_loop()
        accepted = links.same_user(connection)
        await loop.sock_sendall(connection, framing.encode_welcome(accepted=accepted))
        if not accepted:
            self._listener.refuse(TransferFault.REFUSED)
        else:
            await self._listener.until_end(connection)


@dataclass(slots=True, eq=False)
class _Mapping:
    """One source's pool as this process sees it."""

    told: IpcAddress
    base: int
    link: socket.socket
    lane: Lane
    watches: dict[Watch, asyncio.Future[None]] = field(default_factory=dict)
    watching: asyncio.Task[None] | None = None
    lost: bool = False

    def stop(self) -> None:
        """Ends the copies soon, and lets no new one begin."""
        self.lost = True
        for watch in self.watches:
            watch.stop()


class CudaIpcSink:
    """Maps sources' pools and copies granted parts of blocks out of them."""

    name = "cuda_ipc"

    def __init__(
        self, memory: BlockMemory, config: TransferConfig, clock: Callable[[], float], kit: IpcKit
    ) -> None:
        self._memory = memory
        self._timeout_s = config.connect_timeout_s
        self._clock = clock
        self._kit = kit
        self._opened: tuple[Device, MemorySharing, DevicePool] | None = None
        self._mappings: dict[PeerId, _Mapping] = {}
        self._joining: Turns[PeerId] = Turns()
        # One thread: a lane takes work from one at a time, and one copy fills the device's memory bus.
        self._executor = ThreadPoolExecutor(1, "kv-cuda-ipc")

    async def connect(self, source: PeerId, address: str, ticket: bytes, block_bytes: int) -> None:
        """Maps the source's pool unless it is mapped and its link lives."""
        if block_bytes != self._memory.block_bytes:
            message = f"The source's blocks have {block_bytes} bytes, ours {self._memory.block_bytes}."
            raise TransferError(TransferFault.LENGTH, message)
        told = IpcAddress.parse(address)
        async with self._joining.of(source):
            known = self._mappings.get(source)
            if known is not None and known.told == told and not known.lost:
                return
            await self._part_from(source)
            await self._join(source, told, ticket)

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """Copies in a thread; `on_landed` is not called: what has landed is not in any cache of the CPU."""
        mapping = self._mappings.get(source)
        if mapping is None or mapping.lost or self._opened is None:
            raise TransferError(TransferFault.DISCONNECTED, "The source's pool is not mapped.")
        if any(not 0 <= block < mapping.told.num_blocks for block in grant.source_blocks):
            raise TransferError(TransferFault.LENGTH, "The grant names a block that the pool does not have.")
        if len(target) * grant.part_bytes != grant.length_bytes or len(target) != len(grant.source_blocks):
            message = f"{grant.length_bytes} bytes were granted for {len(target)} blocks."
            raise TransferError(TransferFault.LENGTH, message)
        device, pool = self._opened[0], self._opened[2]
        watch = Watch(self._clock, grant.lease_until_s)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mapping.watches[watch] = ended
        try:
            work = _Copying(device, mapping, pool, grant, tuple(target), watch)
            return await run_to_end(self._executor, partial(timed, work.run, self._clock), watch.stop)
        finally:
            del mapping.watches[watch]
            ended.set_result(None)

    async def disconnect(self, source: PeerId) -> None:
        """Stops copying from a source, waits until it stopped, and unmaps."""
        await self._part_from(source)

    async def close(self) -> None:
        """Unmaps everything and ends the thread."""
        for source in tuple(self._mappings):
            await self.disconnect(source)
        self._executor.shutdown(wait=True)

    async def _join(self, source: PeerId, told: IpcAddress, ticket: bytes) -> None:
        device, sharing, _ = self._open()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link = await links.greet(
            connection, b"\0" + told.link.encode(), framing.encode_greeting(ticket), self._timeout_s
        )
        made: list[_Mapping] = []
        try:
            await run_to_end(self._executor, lambda: made.append(_mapped(device, sharing, told, link)))
        except BaseException:
            try:
                for unwanted in made:
                    await run_to_end(self._executor, partial(_unmapped, device, sharing, unwanted.base))
            finally:
                link.close()
            raise
        mapping = self._mappings[source] = made[0]
        mapping.watching = asyncio.create_task(_watch_link(mapping))

    async def _part_from(self, source: PeerId) -> None:
        mapping = self._mappings.pop(source, None)
        if mapping is not None and self._opened is not None:
            await to_its_end(self._unmap(mapping, *self._opened[:2]))

    async def _unmap(self, mapping: _Mapping, device: Device, sharing: MemorySharing) -> None:
        """Unmaps before the link ends, which tells the source that nobody reads any more."""
        mapping.stop()
        for ended in tuple(mapping.watches.values()):
            await outlast(ended)
        try:
            await run_to_end(self._executor, partial(_unmapped, device, sharing, mapping.base))
        finally:
            links.cut(mapping.link)
            if mapping.watching is not None:
                await outlast(mapping.watching)

    def _open(self) -> tuple[Device, MemorySharing, DevicePool]:
        """Opens the device at first use. Raises TransferError (UNSUPPORTED), saying why, without one."""
        if self._opened is None:
            try:
                pool = DevicePool.of(self._memory)
                index = pool.device_index
                self._opened = self._kit.open_device(index), self._kit.open_sharing(index), pool
            except OSError as error:
                raise TransferError(TransferFault.UNSUPPORTED, str(error)) from error
        return self._opened


@dataclass(frozen=True, slots=True)
class _Copying:
    """One transfer, in a thread."""

    device: Device
    mapping: _Mapping
    pool: DevicePool
    grant: PullGrant
    target: tuple[BlockId, ...]
    watch: Watch

    def run(self) -> None:
        """Two chunks at a time; when it returns or raises TransferError, none is under way."""
        size = self.grant.part_bytes
        lane = self.mapping.lane
        with self.device.current():
            marks: list[Mark] = []
            try:
                for chunk in chunks(len(self.target), size, max(CHUNK_BYTES, size)):
                    if len(marks) > 1:
                        wait_for(marks[-2], self.watch.check)
                    self.watch.check()
                    lane.copy(self._copy(chunk))
                    marks.append(lane.mark())
                if marks:
                    wait_for(marks[-1], self.watch.check)
            finally:
                outwait(lane.mark(), QUIET_S)

    def _copy(self, chunk: Chunk) -> PieceCopy:
        begin, end = chunk.first, chunk.first + chunk.count
        offset = self.grant.part_offset
        first = self.mapping.base + self.mapping.told.offset_bytes + offset
        return PieceCopy(
            source=Pieces(first, self.pool.block_bytes),
            source_indices=self.grant.source_blocks[begin:end],
            target=self.pool.pieces(offset),
            target_indices=self.target[begin:end],
            piece_bytes=self.grant.part_bytes,
        )


async def _watch_link(mapping: _Mapping) -> None:
    """Until the source is gone (or says what it should not): then its memory is not read any more."""
    try:
        await asyncio.get_running_loop().sock_recv(mapping.link, 1)
    except OSError:
        # A broken link is one that ended.
        mapping.lost = True
    finally:
        mapping.stop()
        mapping.link.close()


def _mapped(device: Device, sharing: MemorySharing, told: IpcAddress, link: socket.socket) -> _Mapping:
    with device.current():
        return _Mapping(told, sharing.map(told.handle), link, device.lane())


def _unmapped(device: Device, sharing: MemorySharing, base: int) -> None:
    with device.current():
        sharing.unmap(base)
