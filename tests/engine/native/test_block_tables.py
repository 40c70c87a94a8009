"""What stays from step to step in native memory is what a step of its own would have written."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cpu.rope import inverse_frequencies, rotation
from engine.models.model_config import RopeConfig
from engine.native.block_tables import BlockTables
from engine.native.rotation_table import RotationTable
from tandem.ids import BlockId

BLOCKS = 50

tables = st.lists(st.integers(0, BLOCKS - 1).map(BlockId), min_size=1, max_size=20)


def read(address: int, begin: int, count: int) -> list[int]:
    """Numbers that a kernel would see."""
    return list((ctypes.c_int64 * count).from_address(address + 8 * begin))


@given(st.lists(st.lists(tables, min_size=1, max_size=9), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_every_step_reads_its_own_tables(steps: list[list[list[BlockId]]]) -> None:
    kept = BlockTables(BLOCKS)
    for batch in steps:
        kept.reserve(len(batch), max(map(len, batch)))
        begins = [kept.put(row, table, len(table)) for row, table in enumerate(batch)]
        for begin, table in zip(begins, batch, strict=True):
            assert read(kept.address, begin, len(table)) == table


def test_a_table_that_changes_in_place_is_written_again() -> None:
    kept, table = BlockTables(BLOCKS), [BlockId(3), BlockId(4)]
    kept.reserve(1, 2)
    kept.put(0, table, 2)
    table[1] = BlockId(9)
    assert read(kept.address, kept.put(0, table, 2), 2) == [3, 9]


@pytest.mark.parametrize("table", [[0], [0, BLOCKS], [0, -1]])
def test_a_refused_table_leaves_the_row_as_it_was(table: list[int]) -> None:
    kept = BlockTables(BLOCKS)
    kept.reserve(1, 2)
    begin = kept.put(0, [BlockId(5), BlockId(6)], 2)
    with pytest.raises(IndexError):
        kept.put(0, [BlockId(block) for block in table], 2)
    assert read(kept.address, begin, 2) == [5, 6]


@pytest.mark.parametrize("position", [0, 255, 256, 5000])
def test_the_rotation_of_a_position_is_ropes(position: int) -> None:
    frequencies = inverse_frequencies(RopeConfig(10000.0), 16)
    table = RotationTable(frequencies)
    assert table.reach(position) == (position >= 256)
    assert not table.reach(position)
    cosine, sine = rotation(torch.tensor([position]), frequencies, torch.float32)
    assert torch.equal(table.cosine[position], cosine[0])
    assert torch.equal(table.sine[position], sine[0])
