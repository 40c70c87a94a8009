"""KV that one number of tensor-parallel ranks wrote is what another number of them would have written."""

import pytest
import torch
from torch import Tensor

from kvtransfer.contract import HeadRange
from kvtransfer.head_ranges import BlockShape, copies_for, heads_of
from tandem.errors import ConfigError

SHAPE = BlockShape(layers=3, block_size=4, head_dim=8, item_bytes=4)


def block_of(whole: Tensor, heads: HeadRange) -> bytes:
    """A rank's block, cut from a block of all heads [layers, 2, block_size, heads, head_dim]."""
    return whole[..., heads.first : heads.first + heads.count, :].contiguous().numpy().tobytes()


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize(("source_tp", "sink_tp"), [(1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 1), (4, 4)])
def test_resliced_blocks_are_those_of_the_other_degree(source_tp: int, sink_tp: int, kv_heads: int) -> None:
    dimensions = (SHAPE.layers, 2, SHAPE.block_size, kv_heads, SHAPE.head_dim)
    whole = torch.randn(dimensions, generator=torch.Generator().manual_seed(3))
    given = [block_of(whole, heads_of(source_tp, rank, kv_heads)) for rank in range(source_tp)]
    for rank in range(sink_tp):
        expected = block_of(whole, heads_of(sink_tp, rank, kv_heads))
        filled, written = bytearray(len(expected)), bytearray(len(expected))
        for copy in copies_for(source_tp, sink_tp, rank, kv_heads, SHAPE):
            for source, sink, length in copy.runs():
                filled[sink : sink + length] = given[copy.source_rank][source : source + length]
                for place in range(sink, sink + length):
                    written[place] += 1
        assert bytes(filled) == expected
        assert set(written) == {1}, "a byte of the sink's block is left out or written twice"


def test_equal_degrees_copy_whole_blocks_from_the_same_rank() -> None:
    (copy,) = copies_for(4, 4, 3, 8, SHAPE)
    assert (copy.source_rank, copy.rows) == (3, 1)
    assert list(copy.runs()) == [(0, 0, SHAPE.rows * 2 * SHAPE.head_bytes)]


def test_replicas_of_a_head_share_the_work() -> None:
    ranks = [copies_for(4, 4, rank, 2, SHAPE)[0].source_rank for rank in range(4)]
    assert ranks == [0, 1, 2, 3]


@pytest.mark.parametrize(("tp", "rank", "heads"), [(2, 0, 3), (4, 1, 6), (2, 2, 4), (0, 0, 4), (2, 0, 0)])
def test_heads_that_cannot_be_shared_out_are_refused(tp: int, rank: int, heads: int) -> None:
    with pytest.raises(ConfigError):
        heads_of(tp, rank, heads)
