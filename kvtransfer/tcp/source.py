"""Edge: the giving side of the tcp transport: gather-sends blocks straight from the cache.

A sink keeps one or more connections open and asks on them, by a header, for transfers it was granted. A
connection waits on the event loop and sends in a thread.
"""

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace

from kvtransfer.contract import BlockMemory, OnRefused, PeerId, Transfer, TransferConfig
from kvtransfer.device import Device
from kvtransfer.listener import LinkListener
from kvtransfer.tcp import framing, vectors
from kvtransfer.tcp.framing import Header, HeaderKind
from kvtransfer.tcp.host_pages import HostPages, Part, pages_of
from kvtransfer.tcp.tls import Tunnels
from kvtransfer.threads import outlast, run_to_end
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

MAX_SENDS = 32
"""Transfers sent at one time; more wait for a thread."""

MEETING_S = 1.0
"""How long a request on a connection waits for its transfer to be granted here (the two may cross)."""

UNPACED = b"reno"
"""Congestion control that every Linux has and that does not pace."""

PAST_KEPT = 256
"""Ended transfers that are remembered, so that a late request for one is refused at once."""


@dataclass(slots=True)
class _Post:
    """A granted transfer that waits for its sink, or is being sent to it in shares, each on a connection."""

    transfer: Transfer
    blocks: tuple[BlockId, ...]
    part: slice
    ended: asyncio.Future[TransferError | None]
    connections: set[socket.socket] = field(default_factory=set)
    given: set[int] = field(default_factory=set)
    failure: TransferError | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def take(self, asked: Header, connection: socket.socket) -> range | None:
        """The blocks of a share, which this connection now sends; None when it is not to be had."""
        size = self.part.stop - self.part.start
        first, count = asked.offset_bytes // size, asked.length_bytes // size
        blocks = range(first, first + count)
        whole = asked.offset_bytes % size == 0 and asked.length_bytes % size == 0
        if not whole or blocks.stop > len(self.blocks) or asked.transfer != self.transfer:
            return None
        if self.stop.is_set() or not self.given.isdisjoint(blocks):
            return None
        self.given.update(blocks)
        self.connections.add(connection)
        return blocks

    def share_ended(self, connection: socket.socket, error: TransferError | None) -> None:
        """A connection sends no more; the transfer is over when all shares were given, or one failed."""
        self.connections.discard(connection)
        if error is not None:
            self.failure = self.failure or error
            self.cancel()
        elif not self.connections and len(self.given) == len(self.blocks):
            self._end()

    def cancel(self) -> None:
        """Makes sends in progress fail at once, and keeps later ones from starting."""
        self.stop.set()
        if not self.connections:
            self._end()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                # One that broke by itself is noticed by its thread in the same way.
                connection.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        """Raises TransferError when the send should end."""
        if self.stop.is_set():
            raise TransferError(TransferFault.REFUSED, "The source ended the transfer.")

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(self.failure)


class TcpSource:
    """Listens on a port of its own and sends each granted transfer on the connection that asks for it."""

    name = "tcp"
    direct = False
    same_host = False

    def __init__(
        self, memory: BlockMemory, config: TransferConfig, open_device: Callable[[int], Device]
    ) -> None:
        """`open_device` is asked for the device of a pool that is on one."""
        self._memory = memory
        self._open_device = open_device
        self._pages: HostPages | None = None
        self._config = config
        self._tunnels = None if config.tls is None else Tunnels(config.tls)
        self._listener = LinkListener(config.connect_timeout_s, self._serve, self._secure)
        self._address: str | None = None
        self._posts: dict[tuple[PeerId, int], _Post] = {}
        self._posted = asyncio.Condition()
        self._past: deque[tuple[PeerId, int]] = deque(maxlen=PAST_KEPT)
        self._executor = ThreadPoolExecutor(MAX_SENDS, "kv-tcp-source")

    async def start(self, on_link_lost: Callable[[PeerId], None], on_refused: OnRefused) -> None:
        """Binds `bind_host` on a port of the system's choice. Raises OSError, also without the device."""
        self._pages = pages_of(self._memory, self._open_device)
        family = socket.AF_INET6 if ":" in self._config.bind_host else socket.AF_INET
        listener = socket.create_server((self._config.bind_host, 0), family=family, backlog=64)
        port = listener.getsockname()[1]
        host = self._config.advertise_host
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._listener.start(listener, on_link_lost, on_refused)

    def endpoint(self, sink: PeerId, ticket: bytes) -> str | None:
        """host:port as sinks reach it."""
        if self._address is not None:
            self._listener.admit(sink, ticket)
        return self._address

    async def send(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """Waits for the sink's connection and sends; the caller bounds it by cancelling."""
        part = slice(part_offset, part_offset + part_bytes)
        post = _Post(transfer, tuple(blocks), part, asyncio.get_running_loop().create_future())
        place = (sink, transfer.number)
        self._posts[place] = post
        try:
            async with self._posted:
                self._posted.notify_all()
            error = await asyncio.shield(post.ended)
        except asyncio.CancelledError:
            post.cancel()
            await outlast(post.ended)
            raise
        finally:
            self._posts.pop(place, None)
            self._past.append(place)
        if error is not None:
            raise error

    async def close(self) -> None:
        """Ends all connections and threads."""
        for post in tuple(self._posts.values()):
            post.cancel()
        await self._listener.close()
        if self._tunnels is not None:
            await asyncio.to_thread(self._tunnels.close)
        self._executor.shutdown(wait=True)

    async def _secure(self, accepted: socket.socket) -> socket.socket:
        _tune(accepted)
        if self._tunnels is None:
            return accepted
        tunnel = self._tunnels.begin(accepted, True, self._config.connect_timeout_s)
        try:
            near = await asyncio.wrap_future(tunnel.opened)
        except asyncio.CancelledError:
            tunnel.discard()
            raise
        near.setblocking(False)
        return near

    async def _serve(self, connection: socket.socket, sink: PeerId) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, framing.encode_welcome(accepted=True))
        while True:
            asked = await self._listener.read_ask(connection, self._config.connect_timeout_s)
            post = await self._meet(sink, asked)
            share = None if post is None else post.take(asked, connection)
            if post is None or share is None:
                await loop.sock_sendall(connection, framing.encode_header(self._refusal(asked, post)))
                continue
            await self._give(connection, post, asked, share)

    def _refusal(self, asked: Header, post: _Post | None) -> Header:
        if post is None:
            fault = framing.fault_of_ask(asked, None, 0, 1)
        else:
            part_bytes = post.part.stop - post.part.start
            fault = framing.fault_of_ask(asked, post.transfer, len(post.blocks), part_bytes)
        self._listener.refuse(fault)
        return Header(HeaderKind.REFUSED, asked.transfer, 0, fault=fault)

    async def _meet(self, sink: PeerId, asked: Header) -> _Post | None:
        """The granted transfer that was asked for; None when there is none within MEETING_S."""
        place = (sink, asked.transfer.number)
        if place in self._past:
            return None
        try:
            async with asyncio.timeout(MEETING_S), self._posted:
                await self._posted.wait_for(lambda: place in self._posts)
        except TimeoutError:
            return None
        return self._posts.get(place)

    async def _give(self, connection: socket.socket, post: _Post, asked: Header, share: range) -> None:
        pages = self._pages
        if pages is None:
            raise TransferError(TransferFault.DISCONNECTED, "The source was not started.")

        def work() -> None:
            vectors.prepare(connection, self._config.connect_timeout_s)
            size = post.part.stop - post.part.start
            header = replace(asked, kind=HeaderKind.BYTES, length_bytes=len(share) * size)
            first = [memoryview(framing.encode_header(header))]
            part = Part(post.blocks[share.start : share.stop], post.part.start, size)
            with closing(pages.giving(part, post.check)) as chunks:
                for views in chunks:
                    vectors.gather_send(connection, [*first, *views], post.check)
                    first = []

        error: TransferError | None = TransferError(TransferFault.DISCONNECTED, "The connection was closed.")
        try:
            await run_to_end(self._executor, work, post.cancel)
            error = None
        except TransferError as failure:
            error = failure
            raise
        finally:
            post.share_ended(connection, error)
        connection.setblocking(False)


def _tune(connection: socket.socket) -> None:
    """No delay for small messages; a dead host is noticed within about 10 s of silence.

    Within a host there is nothing to share fairly: congestion control that paces (BBR) halves the rate.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if ipaddress.ip_address(connection.getpeername()[0]).is_loopback:
        # A system that forbids the choice keeps its own.
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, UNPACED)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
