"""Edge: the socket beside a communicator: requests and answers, and how each side learns of the other's end.

It carries no unique id and no KV. The sink sends a ticket, the epoch it was told, and a header for each
transfer that it is ready to take; the source answers each before either side enqueues a byte, so no message
is ever posted that the other side does not expect. The kernel closes the socket when a process dies.
"""

import asyncio
import socket
import struct
from typing import Final

from kvtransfer.links import greet
from kvtransfer.listener import read_exactly
from kvtransfer.nccl.address import NcclAddress
from kvtransfer.tcp import framing
from kvtransfer.tcp.framing import Header

_EPOCH: Final = struct.Struct("!Q")


async def read_epoch(connection: socket.socket, within_s: float) -> int:
    """The epoch that follows a greeting. Raises OSError, TransferError when it is cut short."""
    async with asyncio.timeout(within_s):
        (epoch,) = _EPOCH.unpack(await read_exactly(connection, _EPOCH.size))
    return int(epoch)


async def write_header(connection: socket.socket, header: Header) -> None:
    """Sends one. Raises OSError when the link is broken."""
    await asyncio.get_running_loop().sock_sendall(connection, framing.encode_header(header))


async def open_link(address: NcclAddress, ticket: bytes, within_s: float) -> socket.socket:
    """Connects and proves ticket and epoch.

    Raises TransferError: REFUSED for a wrong ticket, STALE_EPOCH for an epoch that the source has left
    behind, UNSUPPORTED when it has no room, TIMEOUT, DISCONNECTED.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    tune(connection)
    greeting = framing.encode_greeting(ticket) + _EPOCH.pack(address.epoch)
    return await greet(connection, (address.host.strip("[]"), address.port), greeting, within_s)


def tune(connection: socket.socket) -> None:
    """No delay for small messages; a dead host is noticed within about 2 s of silence."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1)
