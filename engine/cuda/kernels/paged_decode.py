"""Edge: attention of one new token per sequence over the paged cache, each sequence split among programs.

After FlashDecoding: every split attends to its part of the context and leaves an unnormalised sum, a maximum
and a weight; a second kernel joins them. Lengths and block tables are read on the device and the grid does
not depend on them, so that a CUDA graph can hold the launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.cuda.kernels.precision import wide_products

_TILE = 32
_SMALLEST_DOT = 16


@triton.jit
def _attend_split(
    queries, pool, tables, lengths, sums, maxima, weights,
    heads, kv_heads, table_width, layer_row, block_rows, window, scale,
    head_dim: tl.constexpr, block_size: tl.constexpr, group: tl.constexpr, group_width: tl.constexpr,
    dim_width: tl.constexpr, splits: tl.constexpr, tile: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + sequence)
    begin = tl.maximum(length - window, 0)
    share = tl.cdiv(length - begin, splits)
    first = begin + split * share
    end = tl.minimum(first + share, length)
    member = tl.arange(0, group_width)
    dim = tl.arange(0, dim_width)
    in_dim = dim < head_dim
    head = kv_head * group + member
    in_group = member < group
    query = tl.load(
        queries + (sequence * heads + head)[:, None] * head_dim + dim[None, :],
        mask=in_group[:, None] & in_dim[None, :], other=0.0,
    )  # fmt: skip
    if wide:
        query = query.to(tl.float32)
    best = tl.full((group_width,), float("-inf"), tl.float32)
    weight = tl.zeros((group_width,), tl.float32)
    total = tl.zeros((group_width, dim_width), tl.float32)
    for start in range(first, end, tile):
        at = start + tl.arange(0, tile)
        inside = at < end
        block = tl.load(tables + sequence * table_width + at // block_size, mask=inside, other=0).to(tl.int64)
        row = block * block_rows + layer_row + at % block_size
        cached = pool + (row * kv_heads + kv_head)[:, None] * head_dim + dim[None, :]
        mask = inside[:, None] & in_dim[None, :]
        keys = tl.load(cached, mask=mask, other=0.0).to(query.dtype)
        values = tl.load(cached + block_size * kv_heads * head_dim, mask=mask, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp(best - higher)
        mass = tl.exp(scores - higher[:, None])
        weight = weight * shrink + tl.sum(mass, axis=1)
        total = total * shrink[:, None] + tl.dot(mass.to(values.dtype), values, input_precision="ieee")
        best = higher
    place = (sequence * splits + split) * heads + head
    tl.store(maxima + place, best, mask=in_group)
    tl.store(weights + place, weight, mask=in_group)
    tl.store(sums + place[:, None] * head_dim + dim[None, :], total, mask=in_group[:, None] & in_dim[None, :])


@triton.jit
def _join_splits(
    sums, maxima, weights, out, heads,
    head_dim: tl.constexpr, dim_width: tl.constexpr, splits: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, dim_width)
    in_dim = dim < head_dim
    best = float("-inf")
    for split in range(splits):
        best = tl.maximum(best, tl.load(maxima + (sequence * splits + split) * heads + head))
    weight = 0.0
    total = tl.zeros((dim_width,), tl.float32)
    for split in range(splits):
        place = (sequence * splits + split) * heads + head
        own = tl.load(maxima + place)
        share = tl.where(own == float("-inf"), 0.0, tl.exp(own - best))
        weight += share * tl.load(weights + place)
        total += share * tl.load(sums + place * head_dim + dim, mask=in_dim, other=0.0)
    target = out + (sequence * heads + head) * head_dim + dim
    # A padding sequence has length 0 and no weight: its row is written as zeros.
    tl.store(target, (total / tl.where(weight == 0.0, 1.0, weight)).to(out.dtype.element_ty), mask=in_dim)


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """What the splits leave for the join; reused by every layer and step, fixed in a CUDA graph.

    sums [sequences, splits, heads, head_dim], maxima and weights [sequences, splits, heads], all float32.
    """

    sums: Tensor
    maxima: Tensor
    weights: Tensor

    @classmethod
    def allocate(
        cls, sequences: int, splits: int, heads: int, head_dim: int, device: torch.device
    ) -> "DecodeScratch":
        """Scratch for so many sequences."""
        shape = (sequences, splits, heads)
        return cls(
            torch.empty((*shape, head_dim), dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )


def paged_decode(
    queries: Tensor,
    pool: Tensor,
    layer: int,
    tables: Tensor,
    lengths: Tensor,
    window: int | None,
    scratch: DecodeScratch,
    out: Tensor,
) -> None:
    """Fills `out` [sequences, heads, head_dim] with each query's attention over its sequence.

    queries as `out`; pool [blocks, layers, 2, block_size, kv_heads, head_dim], contiguous; tables int32
    [sequences, blocks]; lengths int32 [sequences], the new token included, 0 for padding. `window` bounds the
    tokens that are seen.
    """
    sequences, heads, head_dim = queries.shape
    _, layers, _, block_size, kv_heads, _ = pool.shape
    splits = scratch.sums.shape[1]
    dim_width = max(_SMALLEST_DOT, triton.next_power_of_2(head_dim))
    group = heads // kv_heads
    _attend_split[(sequences, kv_heads, splits)](
        queries, pool, tables, lengths, scratch.sums, scratch.maxima, scratch.weights,
        heads, kv_heads, tables.shape[1], 2 * layer * block_size, layers * 2 * block_size,
        window or 2**30, head_dim**-0.5,
        head_dim=head_dim, block_size=block_size, group=group,
        group_width=max(_SMALLEST_DOT, triton.next_power_of_2(group)), dim_width=dim_width,
        splits=splits, tile=_TILE, wide=wide_products(queries.dtype),
    )  # fmt: skip
    _join_splits[(sequences, heads)](
        scratch.sums, scratch.maxima, scratch.weights, out, heads,
        head_dim=head_dim, dim_width=dim_width, splits=splits, num_warps=1,
    )  # fmt: skip
