"""Edge: moves many buffers over one blocking socket with few system calls and no copy in this process."""

import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final

from tandem.errors import TransferError, TransferFault

MAX_VECTORS: Final = 512
"""Buffers in one system call; Linux takes 1,024."""


def prepare(connection: socket.socket, stall_s: float) -> None:
    """Makes a socket blocking, each call bounded by the kernel; no call of Python's own in between."""
    connection.setblocking(True)
    seconds, fraction = divmod(stall_s, 1.0)
    bound = struct.pack("ll", int(seconds), int(fraction * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bound)


def gather_send(connection: socket.socket, buffers: Sequence[memoryview], check: Callable[[], None]) -> None:
    """Sends all buffers, of bytes, in order; `check` is called before each system call and may raise.

    Raises TransferError: TIMEOUT when nothing moved for the socket's bound, DISCONNECTED when it broke.
    """
    _drain(buffers, connection.sendmsg, check, "The sink took nothing for too long.")


def scatter_receive(
    connection: socket.socket, buffers: Sequence[memoryview], check: Callable[[], None]
) -> None:
    """Fills all buffers, of bytes, in order; `check` is called before each system call and may raise.

    Raises TransferError: TIMEOUT when nothing came for the socket's bound, TRUNCATED when the stream ended.
    """

    def receive(batch: Sequence[memoryview]) -> int:
        count, _, flags, _ = connection.recvmsg_into(batch, 0, socket.MSG_WAITALL)
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise TransferError(TransferFault.TRUNCATED, "The data connection cut a message.")
        return count

    _drain(buffers, receive, check, "The source sent nothing for too long.")


def _drain(
    buffers: Sequence[memoryview],
    move: Callable[[Sequence[memoryview]], int],
    check: Callable[[], None],
    stalled: str,
) -> None:
    for begin in range(0, len(buffers), MAX_VECTORS):
        left = _after(buffers[begin : begin + MAX_VECTORS], 0)
        while left:
            check()
            try:
                moved = move(left)
            except BlockingIOError as error:
                raise TransferError(TransferFault.TIMEOUT, stalled) from error
            except OSError as error:
                message = f"The data connection broke: {error}."
                raise TransferError(TransferFault.DISCONNECTED, message) from error
            if moved == 0:
                raise TransferError(TransferFault.TRUNCATED, "The data connection ended before its bytes.")
            left = _after(left, moved)


def _after(buffers: Sequence[memoryview], moved: int) -> Sequence[memoryview]:
    """What is left of the buffers once `moved` bytes are gone; nothing when the rest is empty."""
    for index, buffer in enumerate(buffers):
        if moved < len(buffer):
            return [buffer[moved:], *buffers[index + 1 :]]
        moved -= len(buffer)
    return []
