"""Edge: strangers for tests: a raw connection to a source, and a source that answers what it is told."""

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from kvtransfer.cuda.driver import HANDLE_BYTES
from kvtransfer.cuda.ipc import IpcAddress
from kvtransfer.nccl.address import NcclAddress
from kvtransfer.nccl.binding import UNIQUE_ID_BYTES

SILENCE_S = 5.0
"""Bound of every wait here; the parts under test have shorter ones."""

Answering = Callable[[socket.socket], Awaitable[None]]


def link_of(transport: str, address: str) -> tuple[str, int] | bytes:
    """Where a transport's link listens, for `connect`."""
    if transport == "tcp":
        host, _, port = address.rpartition(":")
        return host, int(port)
    if transport == "nccl":
        told = NcclAddress.parse(address)
        return told.host, told.port
    name = IpcAddress.parse(address).link if transport == "cuda_ipc" else address
    return b"\0" + name.encode()


async def say(where: tuple[str, int] | bytes, words: bytes, hang_up: bool) -> bytes:
    """Connects, says it, and gives back all that is answered until the source ends the connection."""
    family = socket.AF_UNIX if isinstance(where, bytes) else socket.AF_INET
    loop = asyncio.get_running_loop()
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        async with asyncio.timeout(SILENCE_S):
            await loop.sock_connect(connection, where)
            await loop.sock_sendall(connection, words)
            if hang_up:
                connection.shutdown(socket.SHUT_WR)
            heard = bytearray()
            while True:
                try:
                    part = await loop.sock_recv(connection, 4096)
                except ConnectionResetError:
                    # What it did not read when it closed: the system says so by a reset.
                    part = b""
                if not part:
                    return bytes(heard)
                heard += part


@asynccontextmanager
async def bad_source(transport: str, answer: Answering) -> AsyncIterator[str]:
    """The address of a source that hears a greeting and answers by `answer`, then closes."""
    listener, address = _listening(transport)
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    attending: set[asyncio.Task[None]] = set()

    async def attend(connection: socket.socket) -> None:
        with connection:
            # All that was sent, or closing would reset the connection before the answer is read.
            await loop.sock_recv(connection, 4096)
            await answer(connection)

    async def accept() -> None:
        while True:
            connection, _ = await loop.sock_accept(listener)
            attending.add(asyncio.create_task(attend(connection)))

    accepting = asyncio.create_task(accept())
    try:
        yield address
    finally:
        for task in (accepting, *attending):
            task.cancel()
        await asyncio.gather(accepting, *attending, return_exceptions=True)
        listener.close()


def _listening(transport: str) -> tuple[socket.socket, str]:
    if transport in ("tcp", "nccl"):
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if transport == "tcp":
            return listener, f"127.0.0.1:{port}"
        unique_id = secrets.token_bytes(UNIQUE_ID_BYTES)
        return listener, NcclAddress("127.0.0.1", port, 1, 1 << 20, unique_id).encode()
    name = f"tandem-test-{secrets.token_hex(8)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(b"\0" + name.encode())
    listener.listen(8)
    if transport == "shm":
        return listener, name
    return listener, IpcAddress(name, bytes(HANDLE_BYTES), 0, 32).encode()
