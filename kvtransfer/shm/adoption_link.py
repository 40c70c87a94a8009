"""Edge: two processes of one host exchange blocks over a unix socket: ask, commit, and ask for the outcome.

The giving side decides by settling; its answer tells the taking side. A link that ended proves that the other
process maps nothing any more: a process closes it only after its pool, and the kernel in the same order.
"""

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

from kvtransfer.shm.adoption import AdoptablePool
from kvtransfer.shm.page_table import ExchangeState, Frames, Numbers, SegmentId
from tandem.errors import ProtocolError, TransferError, TransferFault
from tandem.ids import BlockId

MAX_NUMBERS: Final = 1 << 20
"""Longest list of numbers in a message."""

MAX_DESCRIPTORS: Final = 64
"""Most segments that come with one message."""

_HEADER: Final = struct.Struct("!4sHHQII")
_MAGIC: Final = b"TKVa"


class Kind(IntEnum):
    """What a message says; blocks and frames are lists of 64-bit numbers."""

    ASK = 1
    """The taker wants the blocks that follow; the answer is GRANT with their frames."""
    GRANT = 2
    COMMIT = 3
    """The taker gives the frames that follow in exchange; the answer is SETTLED."""
    SETTLED = 4
    QUERY = 5
    """What became of an exchange? OUTCOME with the frames that were given away, or CANCELLED, which it is."""
    OUTCOME = 6
    CANCELLED = 7
    REFUSED = 8


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `numbers` are blocks, or the segments and then the indices of frames."""

    kind: Kind
    exchange: int
    numbers: Numbers

    @property
    def frames(self) -> Frames:
        """The numbers as frames. Raises TransferError (LENGTH) when they are none."""
        if len(self.numbers) % 2:
            raise TransferError(TransferFault.LENGTH, "A list of frames has an odd number of parts.")
        half = len(self.numbers) // 2
        return Frames(self.numbers[:half], self.numbers[half:])


NOTHING: Final = np.empty(0, dtype=np.int64)


class AdoptionLink:
    """Messages and descriptors over one connected unix stream socket; every wait is bounded."""

    def __init__(self, connection: socket.socket, pool: AdoptablePool, timeout_s: float) -> None:
        connection.settimeout(timeout_s)
        self._connection = connection
        self._pool = pool
        self._sent: set[SegmentId] = set()

    def send(self, kind: Kind, exchange: int, numbers: Numbers = NOTHING) -> None:
        """Sends a message; segments that the peer does not know come first. Raises TransferError."""
        known = self._pool.descriptors
        new = [name for name in known if name not in self._sent][:MAX_DESCRIPTORS]
        names = np.array(new, dtype=np.int64)
        header = _HEADER.pack(_MAGIC, kind, len(new), exchange, len(numbers), 0)
        try:
            socket.send_fds(self._connection, [header], [known[name] for name in new])
            self._connection.sendall(names.tobytes() + numbers.tobytes())
        except OSError as error:
            raise _broken(error) from error
        self._sent.update(new)

    def receive(self) -> Message:
        """The next message; its segments are attached. Raises TransferError."""
        try:
            header, descriptors, _, _ = socket.recv_fds(
                self._connection, _HEADER.size, MAX_DESCRIPTORS, socket.MSG_WAITALL
            )
        except OSError as error:
            raise _broken(error) from error
        try:
            return self._read(header, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def close(self) -> None:
        """Only after the pool was closed: its end tells the peer that nothing is mapped here any more."""
        self._connection.close()

    def _read(self, header: bytes, descriptors: Sequence[int]) -> Message:
        if len(header) < _HEADER.size:
            raise TransferError(TransferFault.DISCONNECTED, "The peer's process is gone.")
        magic, kind, new, exchange, count, _ = _HEADER.unpack(header)
        if magic != _MAGIC or new != len(descriptors) or count > MAX_NUMBERS or kind not in set(Kind):
            raise TransferError(TransferFault.UNSUPPORTED, "The peer's message makes no sense.")
        numbers = self._numbers(new + count)
        for name, descriptor in zip(numbers[:new], descriptors, strict=True):
            self._pool.attach(SegmentId(int(name)), descriptor)
        return Message(Kind(kind), exchange, numbers[new:])

    def _numbers(self, count: int) -> Numbers:
        data = bytearray(count * 8)
        view = memoryview(data)
        while view:
            try:
                got = self._connection.recv_into(view)
            except OSError as error:
                raise _broken(error) from error
            if not got:
                raise TransferError(TransferFault.DISCONNECTED, "The peer's process is gone.")
            view = view[got:]
        return np.frombuffer(data, dtype=np.int64)


def serve_one(link: AdoptionLink, pool: AdoptablePool) -> Kind:
    """Answers one message as the giving side; which kind it was. Raises TransferError when the link ended."""
    message = link.receive()
    try:
        _answer(link, pool, message)
    except ProtocolError:
        link.send(Kind.REFUSED, message.exchange)
    return message.kind


@dataclass(frozen=True, slots=True)
class Prepared:
    """An exchange that both sides are ready for: what each of them would get."""

    exchange: int
    granted: Frames
    offered: Frames


def prepare(
    link: AdoptionLink,
    pool: AdoptablePool,
    exchange: int,
    given: Sequence[BlockId],
    targets: Sequence[BlockId],
) -> Prepared:
    """Puts the giver's blocks and our targets on offer, while nobody waits yet. Raises as `adopt` does."""
    offered = pool.begin(exchange, targets)
    with _resolved(pool, exchange):
        link.send(Kind.ASK, exchange, np.asarray(given, dtype=np.int64))
        granted = _answer_to(link, exchange, Kind.GRANT).frames
    return Prepared(exchange, granted, offered)


def adopt(link: AdoptionLink, pool: AdoptablePool, prepared: Prepared) -> None:
    """Puts the giver's frames behind our targets, and ours behind its blocks.

    Raises TransferError. DISCONNECTED: the giver is gone and nothing was exchanged. TIMEOUT: not known; the
    targets stay in exchange until `ask_outcome` says. Others: refused, nothing was exchanged.
    """
    offered = prepared.offered
    with _resolved(pool, prepared.exchange):
        link.send(Kind.COMMIT, prepared.exchange, np.concatenate((offered.segments, offered.indices)))
        _answer_to(link, prepared.exchange, Kind.SETTLED)
    pool.settle(prepared.exchange, prepared.granted)


def ask_outcome(link: AdoptionLink, pool: AdoptablePool, exchange: int) -> ExchangeState:
    """Ends the doubt about an exchange; the giver cancels it unless it settled. Raises as `adopt`."""
    with _resolved(pool, exchange):
        link.send(Kind.QUERY, exchange)
        answer = link.receive()
        # What was asked before may be answered only now.
        while answer.exchange != exchange or answer.kind not in (Kind.OUTCOME, Kind.CANCELLED):
            answer = link.receive()
    if answer.kind is Kind.OUTCOME:
        pool.settle(exchange, answer.frames)
        return ExchangeState.SETTLED
    pool.cancel(exchange)
    return ExchangeState.CANCELLED


@contextmanager
def _resolved(pool: AdoptablePool, exchange: int) -> Iterator[None]:
    """Cancels our side when the giver refused or is gone; not when it only did not answer."""
    try:
        yield
    except TransferError as error:
        if error.fault is not TransferFault.TIMEOUT:
            pool.cancel(exchange)
        raise


def _answer(link: AdoptionLink, pool: AdoptablePool, message: Message) -> None:
    if message.kind is Kind.ASK:
        frames = pool.begin(message.exchange, [BlockId(block) for block in message.numbers.tolist()])
        link.send(Kind.GRANT, message.exchange, np.concatenate((frames.segments, frames.indices)))
    elif message.kind is Kind.COMMIT:
        pool.settle(message.exchange, message.frames)
        link.send(Kind.SETTLED, message.exchange)
    elif message.kind is Kind.QUERY:
        given = pool.table.given_away(message.exchange)
        if given is None:
            pool.cancel(message.exchange)
            link.send(Kind.CANCELLED, message.exchange)
        else:
            link.send(Kind.OUTCOME, message.exchange, np.concatenate((given.segments, given.indices)))
    else:
        raise ProtocolError(f"A giver is not told {message.kind.name}.")


def _answer_to(link: AdoptionLink, exchange: int, kind: Kind) -> Message:
    """Passes over late answers to other exchanges: their frames belong to other blocks."""
    answer = link.receive()
    while answer.exchange != exchange:
        answer = link.receive()
    if answer.kind is not kind:
        raise TransferError(TransferFault.REFUSED, f"The giver answered {answer.kind.name}.")
    return answer


def _broken(error: OSError) -> TransferError:
    if isinstance(error, TimeoutError):
        return TransferError(TransferFault.TIMEOUT, "The peer did not answer.")
    return TransferError(TransferFault.DISCONNECTED, f"The peer's process is gone: {error}.")
