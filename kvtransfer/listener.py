"""Edge: the source's end of data connections: accepts, checks tickets, notices when a sink is gone."""

import asyncio
import socket
from collections import Counter
from collections.abc import Awaitable, Callable

import structlog

from kvtransfer import framing
from kvtransfer.contract import PeerId
from kvtransfer.tickets import TicketBook
from tandem.errors import TransferError

MAX_CONNECTIONS = 1024
"""Data connections held at one time; more are closed unanswered."""

ACCEPT_PAUSE_S = 0.1
"""Pause after a failed accept (descriptors ran out), so that it does not spin."""

_log = structlog.get_logger("tandem.kvtransfer")


class LinkListener:
    """Accepts connections on one socket and hands each, once its ticket is proved, to `serve`.

    `serve(connection, sink)` gets a non-blocking socket, must answer the greeting itself and returns when the
    connection is over. When a sink's last connection is over, `on_link_lost` is called.
    """

    def __init__(
        self, greeting_timeout_s: float, serve: Callable[[socket.socket, PeerId], Awaitable[None]]
    ) -> None:
        self._greeting_timeout_s = greeting_timeout_s
        self._serve = serve
        self._tickets = TicketBook()
        self._links: Counter[PeerId] = Counter()
        self._connections: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._on_link_lost: Callable[[PeerId], None] = lambda _peer: None

    def start(self, listener: socket.socket, on_link_lost: Callable[[PeerId], None]) -> None:
        """Begins to accept; owns the socket from now on."""
        listener.setblocking(False)
        self._on_link_lost = on_link_lost
        self._accepting = asyncio.create_task(self._accept(listener))

    def admit(self, sink: PeerId, ticket: bytes) -> None:
        """Honours a sink's ticket from now on."""
        self._tickets.admit(sink, ticket)

    async def close(self) -> None:
        """Ends all connections and waits for their servers; idempotent."""
        tasks = [*self._connections]
        if self._accepting is not None:
            tasks.append(self._accepting)
            self._accepting = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError as error:
                    _log.warning("no data connection can be accepted", error=str(error))
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                    continue
                if len(self._connections) >= MAX_CONNECTIONS:
                    connection.close()
                    continue
                connection.setblocking(False)
                task = asyncio.create_task(self._attend(connection))
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)

    async def _attend(self, connection: socket.socket) -> None:
        with connection:
            try:
                async with asyncio.timeout(self._greeting_timeout_s):
                    greeting = await read_exactly(connection, framing.GREETING_BYTES)
                    sink = self._tickets.holder(framing.decode_greeting(greeting))
                    if sink is None:
                        welcome = framing.encode_welcome(accepted=False)
                        await asyncio.get_running_loop().sock_sendall(connection, welcome)
                        return
            except (OSError, TransferError) as error:
                _log.info("data connection refused", error=str(error))
                return
            await self._keep_link(connection, sink)

    async def _keep_link(self, connection: socket.socket, sink: PeerId) -> None:
        self._links[sink] += 1
        try:
            await self._serve(connection, sink)
        except (OSError, TransferError) as error:
            _log.info("data connection ended", sink=sink.worker_id, error=str(error))
        finally:
            # Closed before the count falls: whoever hears that the link is lost may rely on it.
            connection.close()
            self._links[sink] -= 1
            if self._links[sink] == 0:
                del self._links[sink]
                self._on_link_lost(sink)


async def read_exactly(connection: socket.socket, length: int) -> bytes:
    """Reads `length` bytes from a non-blocking socket. Raises OSError when the stream ends before."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    while len(received) < length:
        part = await loop.sock_recv(connection, length - len(received))
        if not part:
            raise ConnectionResetError("The peer closed the data connection.")
        received += part
    return bytes(received)


def is_quiet(connection: socket.socket) -> bool:
    """Whether an idle connection is open and nothing came on it (what came unasked makes it unusable)."""
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
