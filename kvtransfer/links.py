"""Edge: links: sockets that prove a ticket and whose end tells each side of the other's; and their ports."""

import asyncio
import os
import socket
import struct
from typing import Final

from kvtransfer.listener import read_exactly
from kvtransfer.tcp import framing
from tandem.errors import TransferError, TransferFault

BACKLOG: Final = 64
"""Connections that wait to be accepted."""

_CREDENTIALS: Final = struct.Struct("3i")


def listening_as(name: str) -> socket.socket:
    """A unix socket with an abstract name, which nothing can be left of. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(b"\0" + name.encode())
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def listening_on(host: str) -> socket.socket:
    """A TCP socket on an address of this host and a port of the system's choice. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=BACKLOG)


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end of a unix socket is of this process's user."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(raw)
    return bool(user == os.geteuid())


async def greet(
    connection: socket.socket, address: tuple[str, int] | bytes, greeting: bytes, within_s: float
) -> socket.socket:
    """Connects, sends a greeting and reads the welcome; gives the socket back, non-blocking.

    Raises TransferError, the socket being closed then: REFUSED for a wrong ticket, TIMEOUT, DISCONNECTED.
    """
    loop = asyncio.get_running_loop()
    try:
        connection.setblocking(False)
        async with asyncio.timeout(within_s):
            await loop.sock_connect(connection, address)
            await loop.sock_sendall(connection, greeting)
            framing.check_welcome(await read_exactly(connection, framing.WELCOME_BYTES))
    except BaseException as error:
        connection.close()
        if isinstance(error, TimeoutError):
            raise TransferError(TransferFault.TIMEOUT, "The source's link did not answer.") from error
        # A host's name that cannot be one is a ValueError.
        if isinstance(error, OSError | ValueError):
            message = f"The source's link cannot be had: {error}."
            raise TransferError(TransferFault.DISCONNECTED, message) from error
        raise
    return connection


def cut(connection: socket.socket) -> None:
    """Ends a link that a task reads; the task closes it, and the other side hears of it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It is broken or closed already.
        return
