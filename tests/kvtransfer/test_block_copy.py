"""Scattered parts arrive where they belong, whatever the sizes, and nothing else is touched."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.block_copy import Parts, copy_parts, runs_of
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId


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
@given(copies())
def test_parts_arrive_and_nothing_else_changes(case: tuple[int, list[int], list[int], int, int]) -> None:
    block_bytes, given_blocks, taken_blocks, offset, length = case
    chance = np.random.default_rng(length)
    source = chance.integers(0, 256, 16 * block_bytes, dtype=np.uint8)
    target = chance.integers(0, 256, 16 * block_bytes, dtype=np.uint8)
    expected = target.copy().reshape(16, block_bytes)
    part = slice(offset, offset + length)
    expected[taken_blocks, part] = source.reshape(16, block_bytes)[given_blocks, part]
    heard: list[int] = []

    def landed(first: int, count: int) -> None:
        for index in range(first, first + count):
            block = taken_blocks[index]
            assert (target.reshape(16, block_bytes)[block, part] == expected[block, part]).all()
            heard.append(index)

    give = Parts([BlockId(b) for b in given_blocks], block_bytes, offset, length)
    take = Parts([BlockId(b) for b in taken_blocks], block_bytes, offset, length)
    copy_parts(source, give, target, take, landed)
    assert (target.reshape(16, block_bytes) == expected).all()
    assert heard == list(range(len(given_blocks)))


def test_what_landed_may_end_the_copy() -> None:
    source, target = np.ones(8 << 20, dtype=np.uint8), np.zeros(8 << 20, dtype=np.uint8)
    parts = Parts([BlockId(block) for block in range(8)], 1 << 20, 0, 1 << 20)

    def landed(_first: int, _count: int) -> None:
        raise TransferError(TransferFault.LEASE, "over")

    with pytest.raises(TransferError, match="over"):
        copy_parts(source, parts, target, parts, landed, chunk_bytes=1 << 20)
    assert target[-1] == 0


def test_runs_are_parts_that_follow_each_other() -> None:
    blocks = [BlockId(block) for block in (4, 5, 6, 2, 3, 0, 6)]
    assert runs_of(Parts(blocks, 10, 0, 10)) == [(40, 30), (20, 20), (0, 10), (60, 10)]
    assert runs_of(Parts(blocks[:2], 10, 2, 5)) == [(42, 5), (52, 5)]
    assert runs_of(Parts([], 10, 0, 10)) == []


@pytest.mark.parametrize(
    ("blocks", "offset", "length"), [([8], 0, 10), ([-1], 0, 10), ([0], 5, 6), ([0], -1, 5), ([0], 0, 0)]
)
def test_parts_outside_of_the_pool_are_refused(blocks: list[int], offset: int, length: int) -> None:
    with pytest.raises(TransferError) as caught:
        Parts([BlockId(block) for block in blocks], 10, offset, length).check(80)
    assert caught.value.fault is TransferFault.LENGTH
