"""Native loops copy and hash rows as Python does, past the caches or through them, with or without XXH3."""

import numpy as np
import pytest
import xxhash

from kvtransfer import native_rows
from kvtransfer.native_rows import LINE_BYTES, STREAM_BYTES, Addresses

STREAMED = STREAM_BYTES // 16
"""Length of rows of which 16 bypass the caches."""


@pytest.fixture(params=["native", "python"], autouse=True)
def hashing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extension's XXH3, and where it does not show it."""
    if request.param == "python":
        monkeypatch.setattr(native_rows, "_XXH3", None)
    else:
        assert native_rows._XXH3 is not None


def rows(data: np.ndarray[tuple[int], np.dtype[np.uint8]], begins: list[int]) -> Addresses:
    """Addresses of rows that begin there."""
    return np.asarray(begins, dtype=np.int64) + data.ctypes.data


@pytest.mark.parametrize("length", [1, 24, 4096, 70_001, STREAMED, STREAMED - LINE_BYTES])
@pytest.mark.parametrize("shift", [0, 1, 32])
def test_rows_arrive_with_their_sums_and_nothing_else_is_touched(length: int, shift: int) -> None:
    chance = np.random.default_rng(length)
    source = chance.integers(0, 256, 17 * length + 64, dtype=np.uint8)
    target = chance.integers(0, 256, 34 * length + 64, dtype=np.uint8)
    read = [number * length + shift for number in range(16)]
    write = [(2 * number + 1) * length + shift for number in reversed(range(16))]
    expected = target.copy()
    for begin, end in zip(read, write, strict=True):
        expected[end : end + length] = source[begin : begin + length]
    sums = [xxhash.xxh3_64_intdigest(source[begin : begin + length].tobytes()) for begin in read]

    copied, hashed = target.copy(), target.copy()
    native_rows.copy_rows(rows(source, read), rows(copied, write), length)
    found = native_rows.copy_and_hash_rows(rows(source, read), rows(hashed, write), length)
    assert (copied == expected).all()
    assert (hashed == expected).all()
    assert found.tolist() == sums
    assert native_rows.hash_rows(rows(source, read), length).tolist() == sums


def test_no_rows_are_nothing_to_do() -> None:
    none = np.empty(0, dtype=np.int64)
    native_rows.copy_rows(none, none, 64)
    assert native_rows.copy_and_hash_rows(none, none, 64).tolist() == []
    assert native_rows.hash_rows(none, 64).tolist() == []
