"""Edge: the source's end of data connections: accepts, checks tickets, notices when a sink is gone."""

import asyncio
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager

import structlog

from kvtransfer.contract import OnRefused, PeerId
from kvtransfer.handoffs.tickets import TicketBook
from kvtransfer.tcp import framing
from kvtransfer.tcp.framing import Header, HeaderKind
from tandem.errors import TransferError, TransferFault

MAX_CONNECTIONS = 1024
"""Data connections held at one time; more are closed unanswered."""

ACCEPT_PAUSE_S = 0.1
"""Pause after a failed accept (descriptors ran out), so that it does not spin."""

_log = structlog.get_logger("tandem.kvtransfer")


class LinkListener:
    """Accepts connections on one socket and hands each, once its ticket is proved, to `serve`.

    `serve(connection, sink)` gets a non-blocking socket, must answer the greeting itself and returns when the
    connection is over. When a sink's last connection is over, `on_link_lost` is called. What is refused here
    is counted; what `serve` refuses, it tells by `refuse` or reads inside of `counting`.
    """

    def __init__(
        self,
        greeting_timeout_s: float,
        serve: Callable[[socket.socket, PeerId], Awaitable[None]],
        secure: Callable[[socket.socket], Awaitable[socket.socket]] | None = None,
    ) -> None:
        """`secure` takes an accepted connection and gives the one to be used instead, or raises."""
        self._secure = secure
        self._greeting_timeout_s = greeting_timeout_s
        self._serve = serve
        self._tickets = TicketBook()
        self._links: Counter[PeerId] = Counter()
        self._connections: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._on_link_lost: Callable[[PeerId], None] = lambda _peer: None
        self.refuse: OnRefused = lambda _fault: None

    def start(
        self, listener: socket.socket, on_link_lost: Callable[[PeerId], None], on_refused: OnRefused
    ) -> None:
        """Begins to accept; owns the socket from now on."""
        listener.setblocking(False)
        self._on_link_lost = on_link_lost
        self.refuse = on_refused
        self._accepting = asyncio.create_task(self._accept(listener))

    def admit(self, sink: PeerId, ticket: bytes) -> None:
        """Honours a sink's ticket from now on."""
        self._tickets.admit(sink, ticket)

    def forget(self, sink: PeerId) -> None:
        """Honours a sink's ticket no longer; its open connections stay. Idempotent."""
        self._tickets.drop(sink)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is wrong with what a peer says inside; a TimeoutError leaves as a TransferError."""
        try:
            yield
        except TransferError as error:
            self.refuse(error.fault)
            raise
        except TimeoutError as error:
            self.refuse(TransferFault.TIMEOUT)
            raise TransferError(TransferFault.TIMEOUT, "The peer did not say all in time.") from error

    async def read_ask(self, connection: socket.socket, within_s: float) -> Header:
        """A sink's next request: waits for its beginning without a bound, and `within_s` for the rest.

        Raises OSError when the link ends instead, TransferError for a request that is cut short or none.
        """
        with self.counting():
            asked = await read_header(connection, within_s)
            if asked.kind is not HeaderKind.ASK:
                raise TransferError(TransferFault.UNSUPPORTED, f"A sink sent {asked.kind.name}.")
            return asked

    async def until_end(self, connection: socket.socket) -> None:
        """Waits for the end of a link on which a sink says nothing.

        Raises OSError when it breaks, TransferError (UNSUPPORTED) when the sink says something.
        """
        with self.counting():
            if await asyncio.get_running_loop().sock_recv(connection, 1):
                raise TransferError(TransferFault.UNSUPPORTED, "A sink spoke where it has nothing to say.")

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
                    self.refuse(TransferFault.REFUSED)
                    continue
                connection.setblocking(False)
                task = asyncio.create_task(self._attend(connection))
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)

    async def _attend(self, accepted: socket.socket) -> None:
        with ExitStack() as held:
            connection = held.enter_context(accepted)
            try:
                with self.counting():
                    if self._secure is not None:
                        connection = held.enter_context(await self._secure(accepted))
                    async with asyncio.timeout(self._greeting_timeout_s):
                        sink = await self._greeted(connection)
            except (OSError, TransferError) as error:
                _log.info("data connection refused", error=str(error))
                return
            await self._keep_link(connection, sink)

    async def _greeted(self, connection: socket.socket) -> PeerId:
        """Who proved a ticket. Raises OSError or TransferError."""
        greeting = await read_exactly(connection, framing.GREETING_BYTES)
        sink = self._tickets.holder(framing.decode_greeting(greeting))
        if sink is None:
            welcome = framing.encode_welcome(accepted=False)
            await asyncio.get_running_loop().sock_sendall(connection, welcome)
            raise TransferError(TransferFault.REFUSED, "Nobody was given this ticket.")
        return sink

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


async def read_header(connection: socket.socket, within_s: float) -> Header:
    """The next header: waits for its first byte without a bound, for the others `within_s`.

    Keep-alive ends the wait when the peer's host is gone. Raises OSError when the stream ends instead,
    TransferError when it ends half way or what came makes no sense, TimeoutError.
    """
    first = await read_exactly(connection, 1)
    async with asyncio.timeout(within_s):
        fixed = await read_exactly(connection, framing.HEADER_BYTES, first)
        whole = await read_exactly(connection, framing.HEADER_BYTES + framing.leg_bytes(fixed), fixed)
    return framing.decode_header(fixed, whole[framing.HEADER_BYTES :])


async def read_exactly(connection: socket.socket, length: int, begun: bytes = b"") -> bytes:
    """Reads from a non-blocking socket until there are `length` bytes, the ones in `begun` included.

    Raises OSError when the stream ends before the first of all, TransferError (TRUNCATED) when later.
    """
    loop = asyncio.get_running_loop()
    received = bytearray(begun)
    while len(received) < length:
        part = await loop.sock_recv(connection, length - len(received))
        if not part and received:
            message = f"The stream ended after {len(received)} of {length} bytes."
            raise TransferError(TransferFault.TRUNCATED, message)
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
