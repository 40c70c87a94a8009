"""Edge: the giving side of the tcp transport: gather-sends blocks straight from the cache.

A sink keeps one or more connections open and asks on them, by a header, for transfers it was granted. A
connection waits on the event loop and sends in a thread.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial

from kvtransfer import links
from kvtransfer.contract import BlockMemory, OnRefused, PeerId, Transfer, TransferConfig
from kvtransfer.device import Device
from kvtransfer.listener import LinkListener
from kvtransfer.posts import Post, PostBox, Share, refusal
from kvtransfer.tcp import framing, vectors
from kvtransfer.tcp.framing import Header, HeaderKind
from kvtransfer.tcp.host_pages import HostPages, Part, pages_of
from kvtransfer.tcp.tls import Tunnels
from kvtransfer.threads import run_to_end
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

MAX_SENDS = 32
"""Transfers sent at one time; more wait for a thread."""

UNPACED = b"reno"
"""Congestion control that every Linux has and that does not pace."""


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
        self._box = PostBox(whole=False)
        self._executor = ThreadPoolExecutor(MAX_SENDS, "kv-tcp-source")

    async def start(self, on_link_lost: Callable[[PeerId], None], on_refused: OnRefused) -> None:
        """Binds `bind_host` on a port of the system's choice. Raises OSError, also without the device."""
        self._pages = pages_of(self._memory, self._open_device)
        listener = links.listening_on(self._config.bind_host)
        port = listener.getsockname()[1]
        host = self._config.advertise_host
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._listener.start(listener, on_link_lost, on_refused)

    def endpoint(self, sink: PeerId, ticket: bytes) -> str | None:
        """host:port as sinks reach it."""
        if self._address is not None:
            self._listener.admit(sink, ticket)
        return self._address

    def forget(self, sink: PeerId) -> None:
        """See SourceTransport."""
        self._listener.forget(sink)

    async def send(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """Waits for the sink's requests and sends; the caller bounds it by cancelling."""
        await self._box.serve(sink, transfer, blocks, part_offset, part_bytes)

    async def close(self) -> None:
        """Ends all connections and threads."""
        self._box.give_up_all()
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
            post = await self._box.meet(sink, asked.transfer)
            share = None if post is None else post.take(asked, partial(links.cut, connection))
            if post is None or share is None:
                refused = refusal(asked, post)
                self._listener.refuse(refused.fault)
                await loop.sock_sendall(connection, framing.encode_header(refused))
                continue
            await self._give(connection, post, asked, share)

    async def _give(self, connection: socket.socket, post: Post, asked: Header, share: Share) -> None:
        pages = self._pages
        if pages is None:
            raise TransferError(TransferFault.DISCONNECTED, "The source was not started.")

        def work() -> None:
            vectors.prepare(connection, self._config.connect_timeout_s)
            first = [memoryview(framing.encode_header(replace(asked, kind=HeaderKind.BYTES)))]
            blocks = post.blocks[share.places.start : share.places.stop]
            part = Part(blocks, post.part_offset, post.part_bytes)
            with closing(pages.giving(part, post.check)) as chunks:
                for views in chunks:
                    vectors.gather_send(connection, [*first, *views], post.check)
                    first = []

        error: TransferError | None = TransferError(TransferFault.DISCONNECTED, "The connection was closed.")
        try:
            await run_to_end(self._executor, work, post.give_up)
            error = None
        except TransferError as failure:
            error = failure
            raise
        finally:
            post.share_ended(share, error)
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
