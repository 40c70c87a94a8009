"""Scattered parts arrive where they belong, whatever the sizes, and nothing else is touched."""

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.block_copy import CHUNK_BYTES, Parts, Span, copy_parts
from kvtransfer.native_rows import Sums
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId


def span(data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Span:
    """Where an array's bytes lie."""
    return Span(data.ctypes.data, data.nbytes)


@st.composite
def copies(draw: st.DrawFn) -> tuple[int, list[int], list[int], int, int]:
    """(block_bytes, given, taken, offset, length)."""
    unit = draw(st.sampled_from([1, 24, 1024, 4096, 70_000]))
    layers = draw(st.integers(1, 6))
    first = draw(st.integers(0, layers - 1))
    length = draw(st.integers(1, layers - first))
    count = draw(st.integers(1, 12))
    orders = st.permutations(range(16))
    return unit * layers, draw(orders)[:count], draw(orders)[:count], unit * first, unit * length


@settings(max_examples=150, deadline=None)
@given(copies(), st.booleans(), st.sampled_from([1, 100_000, CHUNK_BYTES]))
def test_parts_arrive_and_nothing_else_changes(
    case: tuple[int, list[int], list[int], int, int], hashed: bool, chunk_bytes: int
) -> None:
    block_bytes, given_blocks, taken_blocks, offset, length = case
    chance = np.random.default_rng(length)
    source = chance.integers(0, 256, 16 * block_bytes, dtype=np.uint8)
    target = chance.integers(0, 256, 16 * block_bytes, dtype=np.uint8)
    expected = target.copy().reshape(16, block_bytes)
    part = slice(offset, offset + length)
    expected[taken_blocks, part] = source.reshape(16, block_bytes)[given_blocks, part]
    heard: list[int] = []

    def landed(first: int, count: int, sums: Sums | None) -> None:
        for index in range(first, first + count):
            arrived = target.reshape(16, block_bytes)[taken_blocks[index], part]
            assert (arrived == expected[taken_blocks[index], part]).all()
            heard.append(index)
            if hashed:
                assert sums is not None
                assert sums[index - first] == xxhash.xxh3_64_intdigest(arrived.tobytes())

    give = Parts([BlockId(b) for b in given_blocks], block_bytes, offset, length)
    take = Parts([BlockId(b) for b in taken_blocks], block_bytes, offset, length)
    reads, writes = give.addresses(span(source)), take.addresses(span(target))
    copy_parts(reads, writes, length, landed, hashed, chunk_bytes)
    assert (target.reshape(16, block_bytes) == expected).all()
    assert heard == list(range(len(given_blocks)))


def test_what_landed_may_end_the_copy() -> None:
    source, target = np.ones(8 << 20, dtype=np.uint8), np.zeros(8 << 20, dtype=np.uint8)
    parts = Parts([BlockId(block) for block in range(8)], 1 << 20, 0, 1 << 20)

    def landed(_first: int, _count: int, _sums: Sums | None) -> None:
        raise TransferError(TransferFault.LEASE, "over")

    with pytest.raises(TransferError, match="over"):
        copy_parts(
            *(parts.addresses(span(source)), parts.addresses(span(target)), parts.length, landed),
            chunk_bytes=1 << 20,
        )
    assert target[-1] == 0


@pytest.mark.parametrize(
    ("blocks", "offset", "length"), [([8], 0, 10), ([-1], 0, 10), ([0], 5, 6), ([0], -1, 5), ([0], 0, 0)]
)
def test_parts_outside_of_the_pool_are_refused(blocks: list[int], offset: int, length: int) -> None:
    with pytest.raises(TransferError) as caught:
        Parts([BlockId(block) for block in blocks], 10, offset, length).addresses(Span(4096, 80))
    assert caught.value.fault is TransferFault.LENGTH
