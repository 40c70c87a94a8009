"""Edge: carries bytes between a TLS connection and one end of a socket pair, both ways in one thread.

One thread, because a TLS connection of Python's must not be read in one and written in another.
"""

import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Final

BUFFER_BYTES: Final = 256 * 1024
"""Bytes held in each direction: 16 records, so that few system calls fall to the pair."""

LINGER_S: Final = 1.0
"""How long the peer may take for the last bytes once our side has closed its end."""

_WAITS: Final = (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError)


class _Flow:
    """Bytes on their way from one socket to another."""

    def __init__(self, take: Callable[[memoryview], int], give: Callable[[memoryview], int]) -> None:
        self._take = take
        self._give = give
        self._room = memoryview(bytearray(BUFFER_BYTES))
        self._begin = self._end = 0
        self.ended = False
        """Whether no more will come."""

    @property
    def holds(self) -> bool:
        """Whether bytes wait to be given."""
        return self._begin < self._end

    @property
    def done(self) -> bool:
        """Whether all that will ever come was given."""
        return self.ended and not self.holds

    def move(self) -> bool:
        """Whether something moved. Raises OSError when the receiving side is broken."""
        return self._fill() | self._empty()

    def _fill(self) -> bool:
        """Reads as much as is there, when all that was read before is given."""
        if self.ended or self.holds:
            return False
        self._begin = self._end = 0
        try:
            while self._end < BUFFER_BYTES:
                count = self._take(self._room[self._end :])
                if not count:
                    self.ended = True
                    break
                self._end += count
        except _WAITS:
            return self.holds
        except OSError:
            # A side that broke says no more; what it said before is still carried.
            self.ended = True
        return True

    def _empty(self) -> bool:
        if not self.holds:
            return False
        try:
            self._begin += self._give(self._room[self._begin : self._end])
        except _WAITS:
            return False
        return True


def relay(wire: ssl.SSLSocket, far: socket.socket) -> None:
    """Until one side ends and what it said is carried; both sockets are left non-blocking and open."""
    wire.setblocking(False)
    far.setblocking(False)
    arriving = _Flow(lambda room: wire.recv_into(room), far.send)
    leaving = _Flow(lambda room: far.recv_into(room), wire.send)
    hung_up: set[int] = set()
    until_s: float | None = None
    try:
        while not (arriving.done or leaving.done):
            if arriving.move() | leaving.move():
                continue
            if until_s is None and (leaving.ended or far.fileno() in hung_up):
                until_s = time.monotonic() + LINGER_S
            if until_s is not None and time.monotonic() >= until_s:
                return
            _wait(wire, far, arriving, leaving, hung_up)
    except OSError:
        # Nobody takes what is left.
        return


def _wait(
    wire: ssl.SSLSocket, far: socket.socket, arriving: _Flow, leaving: _Flow, hung_up: set[int]
) -> None:
    """Until a side can be read or written again; one that hung up is noted and not waited for any more."""
    poll = select.poll()
    for end, read, written in ((wire, arriving, leaving), (far, leaving, arriving)):
        if end.fileno() in hung_up:
            continue
        wanted = 0 if read.holds or read.ended else select.POLLIN
        poll.register(end, wanted | (select.POLLOUT if written.holds else 0))
    lingering = leaving.ended or bool(hung_up)
    for descriptor, events in poll.poll(LINGER_S * 100 if lingering else None):
        if events & (select.POLLHUP | select.POLLERR):
            hung_up.add(descriptor)
