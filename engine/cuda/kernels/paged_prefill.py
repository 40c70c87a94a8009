"""Edge: causal attention of several new tokens per sequence over the paged cache (chunked prefill).

After FlashAttention-2: a program holds a tile of one sequence's queries for one head and walks over the keys
it may see, which lie in the pool already, its own chunk's included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.cuda.kernels.precision import wide_products

ROWS = 32
_KEYS = 32
_SMALLEST_DOT = 16


@triton.jit
def _attend_tile(
    queries, pool, tiles, tables, out, heads, kv_heads, table_width, layer_row, block_rows, window, scale,
    head_dim: tl.constexpr, block_size: tl.constexpr, dim_width: tl.constexpr,
    rows: tl.constexpr, keys: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.load(tiles + tile * 4).to(tl.int64)
    first_row = tl.load(tiles + tile * 4 + 1).to(tl.int64)
    first_position = tl.load(tiles + tile * 4 + 2)
    count = tl.load(tiles + tile * 4 + 3)
    kv_head = head // (heads // kv_heads)
    member = tl.arange(0, rows)
    present = member < count
    position = first_position + member
    dim = tl.arange(0, dim_width)
    in_dim = dim < head_dim
    place = ((first_row + member) * heads + head)[:, None] * head_dim + dim[None, :]
    query = tl.load(queries + place, mask=present[:, None] & in_dim[None, :], other=0.0)
    if wide:
        query = query.to(tl.float32)
    best = tl.full((rows,), float("-inf"), tl.float32)
    weight = tl.zeros((rows,), tl.float32)
    total = tl.zeros((rows, dim_width), tl.float32)
    lowest = tl.maximum(first_position - window + 1, 0) // keys * keys
    for start in range(lowest, first_position + count, keys):
        at = start + tl.arange(0, keys)
        inside = at < first_position + count
        block = tl.load(tables + sequence * table_width + at // block_size, mask=inside, other=0).to(tl.int64)
        row = block * block_rows + layer_row + at % block_size
        cached = pool + (row * kv_heads + kv_head)[:, None] * head_dim + dim[None, :]
        mask = inside[:, None] & in_dim[None, :]
        key = tl.load(cached, mask=mask, other=0.0).to(query.dtype)
        value = tl.load(cached + block_size * kv_heads * head_dim, mask=mask, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window)
        scores = tl.where(seen & inside[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        # A row that sees nothing yet has no maximum: minus infinity less itself would be no number.
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(best - anchor)
        mass = tl.exp(scores - anchor[:, None])
        weight = weight * shrink + tl.sum(mass, axis=1)
        total = total * shrink[:, None] + tl.dot(mass.to(value.dtype), value, input_precision="ieee")
        best = higher
    attended = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    tl.store(out + place, attended.to(out.dtype.element_ty), mask=present[:, None] & in_dim[None, :])


@dataclass(frozen=True, slots=True)
class QueryRun:
    """Consecutive rows of a batch that are consecutive tokens of one sequence."""

    sequence: int
    first_row: int
    first_position: int
    tokens: int


def tiles_of(runs: Sequence[QueryRun], device: torch.device) -> Tensor:
    """int32 [tiles, 4]: sequence, first row, first position, rows; the longest contexts first."""
    tiles = [
        (run.sequence, run.first_row + offset, run.first_position + offset, min(ROWS, run.tokens - offset))
        for run in runs
        for offset in range(0, run.tokens, ROWS)
    ]
    tiles.sort(key=lambda tile: -tile[2])
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 4).to(device, non_blocking=True)


def paged_prefill(
    queries: Tensor, pool: Tensor, layer: int, tiles: Tensor, tables: Tensor, window: int | None, out: Tensor
) -> None:
    """Fills `out` [tokens, heads, head_dim] for the rows that the tiles cover.

    queries as `out`; pool [blocks, layers, 2, block_size, kv_heads, head_dim], contiguous, holding the K and
    V of these tokens already; tables int32 [sequences, blocks]. `window` bounds the tokens that are seen.
    """
    _, heads, head_dim = queries.shape
    _, layers, _, block_size, kv_heads, _ = pool.shape
    _attend_tile[(tiles.shape[0], heads)](
        queries, pool, tiles, tables, out, heads, kv_heads, tables.shape[1],
        2 * layer * block_size, layers * 2 * block_size, window or 2**30, head_dim**-0.5,
        head_dim=head_dim, block_size=block_size,
        dim_width=max(_SMALLEST_DOT, triton.next_power_of_2(head_dim)), rows=ROWS, keys=_KEYS,
        wide=wide_products(queries.dtype),
    )  # fmt: skip
