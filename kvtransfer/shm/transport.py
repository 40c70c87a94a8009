"""Edge: the shm transport: a sink on the same host maps the source's pool, read-only, and copies once.

The pool's descriptor travels over an abstract unix socket, so nothing has a name that could be left behind.
The socket stays open as the pair's link: the kernel closes it when the sink's process is gone, which is how
the source knows that nobody reads any more.
"""

import asyncio
import mmap
import os
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from kvtransfer.block_copy import Parts, Span, copy_parts, shares_of
from kvtransfer.contract import BlockMemory, OnLanded, OnRefused, PeerId, PullGrant, Transfer, TransferConfig
from kvtransfer.links import listening_as, same_user
from kvtransfer.listener import LinkListener, is_quiet
from kvtransfer.native_rows import Sums
from kvtransfer.shm.arena_file import MAP_NORESERVE
from kvtransfer.tcp import framing
from kvtransfer.threads import contained, outlast, run_beside, run_to_end, timed, to_its_end
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

MOST_COPY_THREADS: Final = 4
"""Threads that copy one transfer: a few cores reach the memory's bandwidth."""

SHARED_BYTES: Final = 8 * 1024 * 1024
"""From so many bytes on threads share the work: half a millisecond, many times what waking one costs."""

INLINE_BYTES: Final = 1024 * 1024
"""Up to so many bytes are copied on the event loop: a tenth of a millisecond, less than a thread costs."""


class ShmSource:
    """Hands the descriptor of this worker's pool to sinks of the same user on the same host."""

    name = "shm"
    direct = True
    same_host = True

    def __init__(self, memory: BlockMemory, config: TransferConfig) -> None:
        self._memory = memory
        self._address = f"tandem-kv-{secrets.token_hex(16)}"
        self._listener = LinkListener(config.connect_timeout_s, self._serve)
        self._read_only: int | None = None

    async def start(self, on_link_lost: Callable[[PeerId], None], on_refused: OnRefused) -> None:
        """Raises OSError when the pool cannot be shared or abstract sockets are not to be had."""
        descriptor = self._memory.fileno()
        if descriptor is None:
            raise OSError("The KV pool is not in shared memory.")
        # Opened anew so that sinks get a descriptor through which they cannot write.
        self._read_only = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        self._listener.start(listening_as(self._address), on_link_lost, on_refused)

    def endpoint(self, sink: PeerId, ticket: bytes) -> str | None:
        """Name of the abstract socket; None when the pool is not shared."""
        if self._read_only is None:
            return None
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
        """Cuts all links; a sink that still copies notices at its commit."""
        await self._listener.close()
        if self._read_only is not None:
            os.close(self._read_only)
            self._read_only = None

    async def _serve(self, connection: socket.socket, sink: PeerId) -> None:
        loop = asyncio.get_running_loop()
        if not same_user(connection) or self._read_only is None:
            self._listener.refuse(TransferFault.REFUSED)
            await loop.sock_sendall(connection, framing.encode_welcome(accepted=False))
            return
        # A fresh connection's buffer is empty, so these few bytes never block.
        socket.send_fds(connection, [framing.encode_welcome(accepted=True)], [self._read_only])
        await self._listener.until_end(connection)


@dataclass(slots=True)
class _Mapping:
    """One source's pool as this process sees it."""

    link: socket.socket
    pages: mmap.mmap
    address: str
    span: Span
    stop: threading.Event = field(default_factory=threading.Event)
    readers: set[asyncio.Future[None]] = field(default_factory=set)

    def close(self) -> None:
        """Unmaps first: the link's end tells the source that nobody reads any more."""
        self.pages.close()
        self.link.close()


class ShmSink:
    """Maps sources' pools and copies granted blocks out of them."""

    name = "shm"

    def __init__(self, memory: BlockMemory, config: TransferConfig, clock: Callable[[], float]) -> None:
        self._memory = memory
        self._timeout_s = config.connect_timeout_s
        self._clock = clock
        self._mappings: dict[PeerId, _Mapping] = {}
        self._checksum = config.checksum
        # Half of the cores: the others belong to the source, which hashes what it gives meanwhile.
        self._threads = max(1, min(MOST_COPY_THREADS, len(os.sched_getaffinity(0)) // 2))
        self._executor = ThreadPoolExecutor(max(1, config.max_pulls), "kv-shm")
        self._helpers = ThreadPoolExecutor(max(1, (self._threads - 1) * config.max_pulls), "kv-shm-helper")

    async def connect(self, source: PeerId, address: str, ticket: bytes, block_bytes: int) -> None:
        """Maps the source's pool unless it is mapped and its link lives."""
        if block_bytes != self._memory.block_bytes:
            message = f"The source's blocks have {block_bytes} bytes, ours {self._memory.block_bytes}."
            raise TransferError(TransferFault.LENGTH, message)
        known = self._mappings.get(source)
        if known is not None:
            if known.address == address and is_quiet(known.link):
                return
            await self.disconnect(source)
        made = _Attaching(address, ticket, self._timeout_s)
        try:
            mapping = await run_to_end(self._executor, made.attach, made.stop)
        except asyncio.CancelledError:
            made.discard()
            raise
        if source in self._mappings:
            mapping.close()
            return
        self._mappings[source] = mapping

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """Copies in threads, a little here and now; looks at lease and cancellation every few megabytes."""
        mapping = self._mappings.get(source)
        if mapping is None or mapping.stop.is_set():
            raise TransferError(TransferFault.DISCONNECTED, "The source's pool is not mapped.")
        size = self._memory.block_bytes
        given = Parts(grant.source_blocks, size, grant.part_offset, grant.part_bytes)
        taken = Parts(target, size, grant.part_offset, grant.part_bytes)
        reads, writes = given.addresses(mapping.span), taken.addresses(Span.of_pool(self._memory))
        stop = threading.Event()

        def copy(first: int, count: int) -> None:
            def landed(begin: int, number: int, sums: Sums | None) -> None:
                self._check(stop, mapping, grant)
                if on_landed is not None:
                    on_landed(first + begin, number, None if sums is None else sums.tolist())

            mine = slice(first, first + count)
            hashed = self._checksum and on_landed is not None
            copy_parts(reads[mine], writes[mine], grant.part_bytes, landed, hashed)

        if grant.length_bytes <= INLINE_BYTES:
            return timed(lambda: contained(lambda: copy(0, len(target))), self._clock)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mapping.readers.add(ended)
        try:
            shares = shares_of(len(target), self._threads if grant.length_bytes >= SHARED_BYTES else 1)
            works = [partial(copy, *share) for share in shares]
            beside = partial(run_beside, self._helpers, works, stop.set)
            return await run_to_end(self._executor, partial(timed, beside, self._clock), stop.set)
        finally:
            mapping.readers.discard(ended)
            ended.set_result(None)

    async def disconnect(self, source: PeerId) -> None:
        """Stops copying from a source, waits until it stopped, and unmaps."""
        mapping = self._mappings.pop(source, None)
        if mapping is not None:
            await to_its_end(_unmapped(mapping))

    async def close(self) -> None:
        """Unmaps everything and ends the threads."""
        for source in tuple(self._mappings):
            await self.disconnect(source)
        self._executor.shutdown(wait=True)
        self._helpers.shutdown(wait=True)

    def _check(self, stop: threading.Event, mapping: _Mapping, grant: PullGrant) -> None:
        if stop.is_set() or mapping.stop.is_set():
            raise TransferError(TransferFault.DISCONNECTED, "The copy was stopped.")
        if self._clock() >= grant.lease_until_s:
            raise TransferError(TransferFault.LEASE, "The lease ended before all blocks were copied.")


async def _unmapped(mapping: _Mapping) -> None:
    """Once nobody copies from it any more."""
    mapping.stop.set()
    for reader in tuple(mapping.readers):
        await outlast(reader)
    mapping.close()


class _Attaching:
    """One attempt to get a source's descriptor; runs in a thread and can be stopped from another."""

    def __init__(self, address: str, ticket: bytes, timeout_s: float) -> None:
        self._address = address
        self._ticket = ticket
        self._timeout_s = timeout_s
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._mapping: _Mapping | None = None

    def stop(self) -> None:
        """Wakes the thread."""
        try:
            self._link.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def discard(self) -> None:
        """Undoes an attempt that succeeded when nobody wanted it any more."""
        if self._mapping is not None:
            self._mapping.close()
        self._link.close()

    def attach(self) -> _Mapping:
        """Proves the ticket and maps the pool. Raises TransferError; nothing stays open then."""
        try:
            self._mapping = self._attach()
        except TransferError:
            self._link.close()
            raise
        except TimeoutError as error:
            self._link.close()
            raise TransferError(TransferFault.TIMEOUT, "The source's socket did not answer.") from error
        except (OSError, ValueError) as error:
            self._link.close()
            message = f"The source's memory cannot be mapped: {error}."
            raise TransferError(TransferFault.DISCONNECTED, message) from error
        return self._mapping

    def _attach(self) -> _Mapping:
        self._link.settimeout(self._timeout_s)
        self._link.connect(b"\0" + self._address.encode())
        self._link.sendall(framing.encode_greeting(self._ticket))
        welcome, descriptors, _, _ = socket.recv_fds(self._link, framing.WELCOME_BYTES, 1)
        try:
            if len(welcome) != framing.WELCOME_BYTES:
                fault = TransferFault.TRUNCATED if welcome else TransferFault.DISCONNECTED
                raise TransferError(fault, "The source closed its socket before it had answered.")
            framing.check_welcome(welcome)
            if len(descriptors) != 1:
                raise TransferError(TransferFault.UNSUPPORTED, "The source gave no descriptor of its pool.")
            size = os.fstat(descriptors[0]).st_size
            # An arena is larger than what has memory in it, and reading it takes none.
            flags = mmap.MAP_SHARED | MAP_NORESERVE
            pages = mmap.mmap(descriptors[0], size, flags, mmap.PROT_READ)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        # A link that waits would make the look at whether it lives wait, too.
        self._link.setblocking(False)
        return _Mapping(self._link, pages, self._address, Span.of(pages))
