"""Edge: what loopback TCP gives by itself: one stream between two processes, one large buffer at each end.

The limit that `tandem bench kv` puts beside the tcp transport. The reader asks for a number of bytes in eight
bytes (big-endian), the source sends as many.
"""

import mmap
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from kvtransfer.tcp.vectors import prepare
from tandem.errors import TandemError

TIMEOUT_S = 10.0

_ASK = struct.Struct("!Q")


@contextmanager
def raw_source(largest_bytes: int) -> Iterator[int]:
    """Serves one reader at a time on loopback from a thread; the value is the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve, args=(listener, largest_bytes), name="raw-tcp", daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            # Wakes the accept; the thread ends with the listener or with its reader.
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT_S)


def _serve(listener: socket.socket, largest_bytes: int) -> None:
    with mmap.mmap(-1, largest_bytes) as pages, memoryview(pages) as data:
        data[:] = b"\x07" * largest_bytes
        while True:
            try:
                reader, _ = listener.accept()
            except OSError:
                return
            with reader:
                _answer(reader, data)


def _answer(reader: socket.socket, data: memoryview) -> None:
    prepare(reader, TIMEOUT_S)
    reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while len(asked := reader.recv(_ASK.size, socket.MSG_WAITALL)) == _ASK.size:
        reader.sendall(data[: _ASK.unpack(asked)[0]])


class RawReader:
    """The reading end; a context manager."""

    def __init__(self, port: int, largest_bytes: int) -> None:
        """Connects. Raises OSError."""
        self._pages = mmap.mmap(-1, largest_bytes)
        self._data = memoryview(self._pages)
        self._data[:] = bytes(largest_bytes)
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        prepare(self._socket, TIMEOUT_S)

    def read(self, length: int) -> None:
        """Fetches so many bytes. Raises TandemError when the stream ends before."""
        self._socket.sendall(_ASK.pack(length))
        came = self._socket.recv_into(self._data[:length], length, socket.MSG_WAITALL)
        if came != length:
            raise TandemError(f"The raw stream ended after {came} of {length} bytes.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()
        self._data.release()
        self._pages.close()
