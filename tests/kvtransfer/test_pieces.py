"""In which pieces a growing offer moves: each byte once, nothing before it is ready, small ones together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.contract import BlockRange, KvReady
from kvtransfer.handoffs.pieces import (
    MAX_PIECE_BYTES,
    MIN_PIECE_BYTES,
    complete,
    grown,
    layer_span,
    next_piece,
    remainder,
)
from tandem.errors import ProtocolError, TransferError, TransferFault

LAYERS = 30
LAYER_BYTES = 24_576
"""As SmolLM2-135M in float32 with blocks of 16 tokens."""


def cells(part: BlockRange, layers: int) -> set[tuple[int, int]]:
    """(block, layer) of a range."""
    first, end = layer_span(part, layers)
    blocks = range(part.first_block, part.first_block + part.num_blocks)
    return {(block, layer) for block in blocks for layer in range(first, end)}


def ready_cells(ready: KvReady, num_blocks: int, layers: int) -> set[tuple[int, int]]:
    """What a state of an offer promises."""
    return {
        (block, layer)
        for block in range(num_blocks)
        for layer in range(layers)
        if block < ready.blocks or layer < ready.layers
    }


@given(
    layers=st.integers(1, 6),
    num_blocks=st.integers(1, 12),
    skipped=st.integers(0, 11),
    layer_bytes=st.sampled_from([64, MIN_PIECE_BYTES // 4, MAX_PIECE_BYTES // 3]),
    growth=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=8),
)
def test_every_byte_moves_once_and_none_before_it_is_ready(
    layers: int, num_blocks: int, skipped: int, layer_bytes: int, growth: list[tuple[int, int]]
) -> None:
    whole = BlockRange(min(skipped, num_blocks - 1), num_blocks - min(skipped, num_blocks - 1))
    wanted: BlockRange | None = whole
    ready = KvReady(0, 0)
    moved: set[tuple[int, int]] = set()
    while wanted is not None:
        piece = next_piece(wanted, ready, layers, layer_bytes)
        if piece is None:
            assert not complete(ready, num_blocks, layers), "a complete offer is not granted"
            blocks, more = growth.pop() if growth else (num_blocks, layers)
            ready = grown(
                ready, KvReady(min(num_blocks, ready.blocks + blocks), min(layers, ready.layers + more))
            )
            if complete(ready, num_blocks, layers):
                ready = KvReady(num_blocks, layers)
            continue
        part = cells(piece, layers)
        assert part <= ready_cells(ready, num_blocks, layers)
        assert part
        assert not part & moved
        moved |= part
        wanted = remainder(wanted, piece, layers)
    assert moved == cells(whole, layers)


def test_complete_offer_of_ordinary_size_is_one_piece() -> None:
    wanted = BlockRange(3, 72)
    assert next_piece(wanted, KvReady(75, LAYERS), LAYERS, LAYER_BYTES) == wanted


def test_little_that_is_ready_waits_for_more() -> None:
    wanted = BlockRange(0, 75)
    assert next_piece(wanted, KvReady(1, 0), LAYERS, LAYER_BYTES) is None
    assert next_piece(wanted, KvReady(2, 0), LAYERS, LAYER_BYTES) == BlockRange(0, 2)
    assert next_piece(BlockRange(70, 5), KvReady(70, 4), LAYERS, LAYER_BYTES) is None


def test_last_chunk_moves_in_layer_groups() -> None:
    wanted = BlockRange(64, 11)
    first = next_piece(wanted, KvReady(64, 10), LAYERS, LAYER_BYTES)
    assert first == BlockRange(64, 11, 0, 10)
    rest = remainder(wanted, first, LAYERS)
    assert rest == BlockRange(64, 11, 10, 20)
    assert next_piece(rest, KvReady(64, 12), LAYERS, LAYER_BYTES) is None
    assert next_piece(rest, KvReady(75, 30), LAYERS, LAYER_BYTES) == rest


def test_much_is_cut_so_that_a_lease_suffices() -> None:
    piece = next_piece(BlockRange(0, 1000), KvReady(1000, LAYERS), LAYERS, LAYER_BYTES)
    assert piece is not None
    assert MAX_PIECE_BYTES // 2 < piece.num_blocks * LAYERS * LAYER_BYTES <= MAX_PIECE_BYTES
    layer = next_piece(BlockRange(0, 1000, 5, 25), KvReady(1000, LAYERS), LAYERS, LAYER_BYTES)
    assert layer == BlockRange(0, 1000, 5, 2)


def test_nothing_wanted_waits_for_the_whole_offer() -> None:
    assert next_piece(BlockRange(75, 0), KvReady(64, 10), LAYERS, LAYER_BYTES) is None
    assert next_piece(BlockRange(75, 0), KvReady(75, LAYERS), LAYERS, LAYER_BYTES) == BlockRange(75, 0)


@pytest.mark.parametrize("after", [KvReady(3, 10), KvReady(5, 1)])
def test_offer_that_shrinks_is_a_protocol_error(after: KvReady) -> None:
    with pytest.raises(ProtocolError, match="cannot shrink"):
        grown(KvReady(4, 2), after)


@pytest.mark.parametrize(
    "granted",
    [
        BlockRange(1, 2),
        BlockRange(0, 5),
        BlockRange(0, 0),
        BlockRange(0, 2, 0, 3),
        BlockRange(0, 4, 1, 3),
        BlockRange(0, 4, 0, 99),
    ],
)
def test_grant_that_is_no_first_piece_is_refused(granted: BlockRange) -> None:
    with pytest.raises(TransferError) as caught:
        remainder(BlockRange(0, 4), granted, LAYERS)
    assert caught.value.fault is TransferFault.LENGTH
