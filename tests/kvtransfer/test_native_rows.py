"""Native loops copy rows, past the caches or through them, and hash them as the xxhash library does."""

import numpy as np
import pytest
import xxhash

from kvtransfer import native_rows
from kvtransfer.native_rows import LINE_BYTES, SHORT_BYTES, SPAN_BYTES, STREAM_BYTES, Addresses

STREAMED = STREAM_BYTES // 16
"""Length of rows of which 16 bypass the caches."""


Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def drawn(seed: int, length: int) -> Bytes:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


def on_a_line(data: Bytes) -> Bytes:
    """A copy that begins where a line of the cache does."""
    memory = np.empty(len(data) + LINE_BYTES, dtype=np.uint8)
    first = -memory.ctypes.data % LINE_BYTES
    memory[first : first + len(data)] = data
    return memory[first : first + len(data)]


def rows(data: Bytes, begins: list[int]) -> Addresses:
    """Addresses of rows that begin there."""
    return np.asarray(begins, dtype=np.int64) + data.ctypes.data


LENGTHS = (
    *(1, 24, SHORT_BYTES, SHORT_BYTES + 1, 4 * LINE_BYTES, SPAN_BYTES - 1, SPAN_BYTES, SPAN_BYTES + 1),
    *(4096, 70_001, STREAMED - LINE_BYTES, STREAMED, STREAMED + 4 * LINE_BYTES),
)
"""Around the bounds of XXH3's forms, and of what bypasses the caches."""


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shift", [0, 1, 32])
def test_rows_arrive_with_their_sums_and_nothing_else_is_touched(length: int, shift: int) -> None:
    source, target = on_a_line(drawn(1, 17 * length + 64)), drawn(2, 34 * length + 64)
    read = [number * length + shift for number in range(16)]
    write = [(2 * number + 1) * length + shift for number in reversed(range(16))]
    expected = target.copy()
    for begin, end in zip(read, write, strict=True):
        expected[end : end + length] = source[begin : begin + length]
    sums = [xxhash.xxh3_64_intdigest(source[begin : begin + length].tobytes()) for begin in read]

    copied, hashed = on_a_line(target), on_a_line(target)
    native_rows.copy_rows(rows(source, read), rows(copied, write), length)
    found = native_rows.copy_and_hash_rows(rows(source, read), rows(hashed, write), length)
    assert (copied == expected).all()
    assert (hashed == expected).all()
    assert found.tolist() == sums
    assert native_rows.hash_rows(rows(source, read), length).tolist() == sums


def test_every_length_has_the_sum_of_the_library() -> None:
    source = drawn(3, 3 * SPAN_BYTES)
    for length in range(1, len(source)):
        (found,) = native_rows.hash_rows(rows(source, [0]), length).tolist()
        assert found == xxhash.xxh3_64_intdigest(source[:length].tobytes())


def test_no_rows_are_nothing_to_do() -> None:
    none = np.empty(0, dtype=np.int64)
    native_rows.copy_rows(none, none, 64)
    assert native_rows.copy_and_hash_rows(none, none, 64).tolist() == []
    assert native_rows.hash_rows(none, 64).tolist() == []
