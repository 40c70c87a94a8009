"""Edge: the taking side of the tcp transport: scatter-receives blocks straight into the cache.

Connections to a source are pooled: one is opened when the pair connects, more when transfers overlap. A
connection that failed is closed; its end tells the source that the sink takes nothing more on it.
"""

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NoReturn

from kvtransfer.block_copy import shares_of
from kvtransfer.contract import BlockMemory, OnLanded, PeerId, PullGrant, TransferConfig
from kvtransfer.device import Device
from kvtransfer.listener import is_quiet
from kvtransfer.tcp import framing, vectors
from kvtransfer.tcp.framing import Header, HeaderKind
from kvtransfer.tcp.host_pages import HostPages, Part, pages_of
from kvtransfer.tcp.tls import Tunnels
from kvtransfer.threads import outlast, run_beside, run_to_end, timed, to_its_end
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

STREAMS: Final = 2
"""Connections that a large transfer is spread over: one keeps neither core of its ends busy all the time."""

STREAMED_BYTES: Final = 4 * 1024 * 1024
"""From so many bytes on a transfer is spread."""

STREAMED_PART_BYTES: Final = 256 * 1024
"""Only parts of at least so many bytes are spread: with smaller ones two threads contend for the GIL."""


@dataclass(frozen=True, slots=True)
class _Share:
    """The targets of a grant's blocks from `first` on, which come over one connection."""

    grant: PullGrant
    first: int
    part: Part
    pages: HostPages
    on_landed: OnLanded | None


class _Line:
    """One data connection, used by one thread at a time and stopped from any."""

    def __init__(self, address: str, ticket: bytes, timeout_s: float, tunnels: Tunnels | None) -> None:
        self._tunnels = tunnels
        self._address = address
        self._ticket = ticket
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._stopped = threading.Event()

    @property
    def usable(self) -> bool:
        """Whether it is open, idle and has not been stopped."""
        return self._socket is not None and not self._stopped.is_set() and is_quiet(self._socket)

    def open(self) -> None:
        """Connects and proves the ticket unless that is done; blocks, bounded. Raises TransferError."""
        if self._socket is not None:
            return
        host, _, port = self._address.rpartition(":")
        try:
            made = socket.create_connection((host.strip("[]"), int(port)), self._timeout_s)
        except (OSError, ValueError, OverflowError) as error:
            self._fail(f"The source's port cannot be reached: {error}.", error)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tunnels is not None:
            made = self._tunnels.begin(made, False, self._timeout_s).opened.result()
        self._socket = made
        self.check()
        vectors.prepare(made, self._timeout_s)
        try:
            made.sendall(framing.encode_greeting(self._ticket))
        except OSError as error:
            self._fail(f"The data connection broke: {error}.", error)
        welcome = bytearray(framing.WELCOME_BYTES)
        vectors.scatter_receive(made, [memoryview(welcome)], self.check)
        framing.check_welcome(bytes(welcome))

    def fetch(self, share: "_Share", check: Callable[[], None]) -> None:
        """Asks for a share of a transfer and receives it; blocks. Raises TransferError."""
        self.open()
        if self._socket is None:
            raise TransferError(TransferFault.DISCONNECTED, "The data connection is closed.")
        size = share.grant.part_bytes
        length, offset = len(share.part.blocks) * size, share.first * size
        ask = Header(HeaderKind.ASK, share.grant.transfer, length, offset)
        try:
            self._socket.sendall(framing.encode_header(ask))
        except OSError as error:
            self._fail(f"The data connection broke: {error}.", error)
        header = self._read_header(self._socket)
        framing.check_header(header, share.grant.transfer, length, offset)
        with closing(share.pages.taking(share.part, check)) as steps:
            for begin, count, views in steps:
                vectors.scatter_receive(self._socket, views, check)
                if share.on_landed is not None and share.pages.lands_in_place:
                    share.on_landed(share.first + begin, count)

    def stop(self) -> None:
        """Makes whatever blocks on the connection fail soon; it cannot be used any more."""
        self._stopped.set()
        if self._socket is None:
            return
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # It broke by itself, or is only being connected; that is bounded by its own timeout.
            return

    def close(self) -> None:
        """Closes the socket; only when no thread uses it."""
        self._stopped.set()
        if self._socket is not None:
            self._socket.close()

    def check(self) -> None:
        """Raises TransferError when it was stopped."""
        if self._stopped.is_set():
            raise TransferError(TransferFault.DISCONNECTED, "The transfer was stopped.")

    def _read_header(self, connection: socket.socket) -> Header:
        fixed = bytearray(framing.HEADER_BYTES)
        vectors.scatter_receive(connection, [memoryview(fixed)], self.check)
        leg = bytearray(framing.leg_bytes(bytes(fixed)))
        vectors.scatter_receive(connection, [memoryview(leg)], self.check)
        return framing.decode_header(bytes(fixed), bytes(leg))

    def _fail(self, message: str, cause: Exception) -> NoReturn:
        waited = isinstance(cause, TimeoutError | BlockingIOError)
        fault = TransferFault.TIMEOUT if waited else TransferFault.DISCONNECTED
        raise TransferError(fault, message) from cause


@dataclass(slots=True)
class _Pair:
    """The connections to one source."""

    address: str
    ticket: bytes
    idle: list[_Line] = field(default_factory=list)
    active: dict[_Line, asyncio.Future[None]] = field(default_factory=dict)


class TcpSink:
    """Fetches granted blocks over pooled connections."""

    name = "tcp"

    def __init__(
        self,
        memory: BlockMemory,
        config: TransferConfig,
        clock: Callable[[], float],
        open_device: Callable[[int], Device],
    ) -> None:
        """`open_device` is asked for the device of a pool that is on one."""
        self._memory = memory
        self._open_device = open_device
        self._pages: HostPages | None = None
        self._config = config
        self._clock = clock
        self._pairs: dict[PeerId, _Pair] = {}
        self._tunnels = None if config.tls is None else Tunnels(config.tls)
        self._executor = ThreadPoolExecutor(max(1, config.max_pulls), "kv-tcp-sink")
        self._helpers = ThreadPoolExecutor((STREAMS - 1) * max(1, config.max_pulls), "kv-tcp-helper")

    async def connect(self, source: PeerId, address: str, ticket: bytes, block_bytes: int) -> None:
        """Opens a first connection, whose end will tell the source that we are gone, unless one is open."""
        if block_bytes != self._memory.block_bytes:
            message = f"The source's blocks have {block_bytes} bytes, ours {self._memory.block_bytes}."
            raise TransferError(TransferFault.LENGTH, message)
        self._reach()
        pair = self._pairs.get(source)
        if pair is not None and (pair.address, pair.ticket) != (address, ticket):
            await self.disconnect(source)
        pair = self._pairs.setdefault(source, _Pair(address, ticket))
        _drop_unusable(pair)
        if pair.idle or pair.active:
            return
        line = self._new_line(pair)
        try:
            await run_to_end(self._executor, line.open, line.stop)
        except BaseException:
            line.close()
            raise
        self._give_back(source, pair, line)

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """Receives in a thread; looks at the lease after every few megabytes."""
        pair = self._pairs.get(source)
        if pair is None:
            raise TransferError(TransferFault.DISCONNECTED, "There is no connection to the source.")
        if len(target) * grant.part_bytes != grant.length_bytes:
            message = f"{grant.length_bytes} bytes were granted for {len(target)} blocks."
            raise TransferError(TransferFault.LENGTH, message)
        _drop_unusable(pair)
        large = grant.length_bytes >= STREAMED_BYTES and grant.part_bytes >= STREAMED_PART_BYTES
        shares = shares_of(len(target), STREAMS if large else 1)
        lines = [pair.idle.pop() if pair.idle else self._new_line(pair) for _ in shares]
        works = [
            partial(self._fetch, line, grant, target, share, on_landed)
            for line, share in zip(lines, shares, strict=True)
        ]
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        pair.active.update(dict.fromkeys(lines, ended))

        def stop() -> None:
            for line in lines:
                line.stop()

        succeeded = False
        try:
            beside = partial(run_beside, self._helpers, works, stop)
            copy_s = await run_to_end(self._executor, partial(timed, beside, self._clock), stop)
            succeeded = True
        finally:
            ended.set_result(None)
            for line in lines:
                del pair.active[line]
                if not succeeded:
                    line.close()
        for line in lines:
            self._give_back(source, pair, line)
        return copy_s

    async def disconnect(self, source: PeerId) -> None:
        """Stops what runs with a source, waits until it stopped, and closes its connections."""
        pair = self._pairs.pop(source, None)
        if pair is not None:
            await to_its_end(_closed(pair))

    async def close(self) -> None:
        """Closes all connections and ends the threads."""
        for source in tuple(self._pairs):
            await self.disconnect(source)
        if self._tunnels is not None:
            await asyncio.to_thread(self._tunnels.close)
        self._executor.shutdown(wait=True)
        self._helpers.shutdown(wait=True)

    def _fetch(
        self,
        line: _Line,
        grant: PullGrant,
        target: Sequence[BlockId],
        share: tuple[int, int],
        on_landed: OnLanded | None,
    ) -> None:
        def check() -> None:
            line.check()
            if self._clock() >= grant.lease_until_s:
                raise TransferError(TransferFault.LEASE, "The lease ended before all blocks had come.")

        first, count = share
        part = Part(target[first : first + count], grant.part_offset, grant.part_bytes)
        line.fetch(_Share(grant, first, part, self._reach(), on_landed), check)

    def _reach(self) -> HostPages:
        """The pool, whose device is opened at first use. Raises TransferError (UNSUPPORTED), saying why."""
        if self._pages is None:
            try:
                self._pages = pages_of(self._memory, self._open_device)
            except OSError as error:
                raise TransferError(TransferFault.UNSUPPORTED, str(error)) from error
        return self._pages

    def _new_line(self, pair: _Pair) -> _Line:
        return _Line(pair.address, pair.ticket, self._config.connect_timeout_s, self._tunnels)

    def _give_back(self, source: PeerId, pair: _Pair, line: _Line) -> None:
        if self._pairs.get(source) is pair:
            pair.idle.append(line)
        else:
            line.close()


async def _closed(pair: _Pair) -> None:
    """Stops what runs, waits until it stopped (a transfer closes its own lines), and closes the others."""
    running = tuple(pair.active.items())
    for line, _ in running:
        line.stop()
    for _, ended in running:
        await outlast(ended)
    while pair.idle:
        pair.idle.pop().close()


def _drop_unusable(pair: _Pair) -> None:
    """Closes idle connections that the source closed or wrote to unasked."""
    for line in [line for line in pair.idle if not line.usable]:
        pair.idle.remove(line)
        line.close()
