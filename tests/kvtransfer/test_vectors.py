"""Many buffers over one socket: every byte once, in order, whatever the sizes."""

import random
import socket
import threading

import pytest

from kvtransfer.tcp import vectors
from tandem.errors import TransferError, TransferFault


def nothing() -> None:
    """No lease, no cancellation."""


@pytest.fixture
def ends() -> "list[socket.socket]":
    """Two connected sockets with a bound of 0.3 s."""
    made = list(socket.socketpair())
    for end in made:
        vectors.prepare(end, 0.3)
    return made


@pytest.mark.parametrize("sizes", [[1] * 3000, [0, 5, 0, 70_000, 1], [12_000_000, 3], [4096] * 1100])
def test_all_bytes_arrive_in_order(ends: list[socket.socket], sizes: list[int]) -> None:
    chance = random.Random(5)
    sent = [chance.randbytes(size) for size in sizes]
    received = [bytearray(size) for size in reversed(sizes)]
    sender = threading.Thread(
        target=vectors.gather_send, args=(ends[0], [memoryview(part) for part in sent], nothing)
    )
    sender.start()
    vectors.scatter_receive(ends[1], [memoryview(part) for part in received], nothing)
    sender.join()
    assert b"".join(received) == b"".join(sent)
    for end in ends:
        end.close()


def test_stream_that_ends_early_is_truncated(ends: list[socket.socket]) -> None:
    ends[0].sendall(b"abc")
    ends[0].close()
    with pytest.raises(TransferError) as caught:
        vectors.scatter_receive(ends[1], [memoryview(bytearray(8))], nothing)
    assert caught.value.fault is TransferFault.TRUNCATED
    ends[1].close()


def test_silent_peer_is_a_timeout(ends: list[socket.socket]) -> None:
    with pytest.raises(TransferError) as caught:
        vectors.scatter_receive(ends[1], [memoryview(bytearray(8))], nothing)
    assert caught.value.fault is TransferFault.TIMEOUT
    with pytest.raises(TransferError) as caught:
        vectors.gather_send(ends[0], [memoryview(bytes(1 << 24))], nothing)
    assert caught.value.fault is TransferFault.TIMEOUT
    for end in ends:
        end.close()


def test_shutdown_by_another_thread_ends_a_receive(ends: list[socket.socket]) -> None:
    vectors.prepare(ends[1], 10.0)
    stopper = threading.Timer(0.05, ends[1].shutdown, (socket.SHUT_RDWR,))
    stopper.start()
    with pytest.raises(TransferError):
        vectors.scatter_receive(ends[1], [memoryview(bytearray(8))], nothing)
    stopper.join()
    for end in ends:
        end.close()
