"""Edge: from the joint QKV projection: rotates queries, and rotates keys and stores K and V into the pool.

One program does one head of one token. Query and key norms (Qwen3) come first where the model has them.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope_write(
    projected, positions, frequencies, slots, query_norm, key_norm, queries, pool,
    heads, kv_heads, layer_row, epsilon,
    head_dim: tl.constexpr, block_size: tl.constexpr, norms: tl.constexpr, half_width: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = head_dim // 2
    at = tl.arange(0, half_width)
    inside = at < half
    source = projected + (token * (heads + 2 * kv_heads) + head) * head_dim
    first = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + at, mask=inside, other=0.0).to(tl.float32)
    is_query = head < heads
    is_value = head >= heads + kv_heads
    if norms and not is_value:
        squares = tl.sum(first * first + second * second, axis=0)
        scale = 1.0 / tl.sqrt(squares / head_dim + epsilon)
        weight = query_norm
        if not is_query:
            weight = key_norm
        # Rounded to the stored type, as a norm of its own would leave it.
        kind = projected.dtype.element_ty
        first = (first * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)).to(kind)
        second = (second * scale * tl.load(weight + half + at, mask=inside, other=0.0).to(tl.float32)).to(
            kind
        )
        first = first.to(tl.float32)
        second = second.to(tl.float32)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + at, mask=inside, other=0.0)
    cosine = tl.cos(angle)
    sine = tl.sin(angle)
    if is_value:
        cosine = cosine * 0.0 + 1.0
        sine = sine * 0.0
    turned_first = first * cosine - second * sine
    turned_second = second * cosine + first * sine
    if is_query:
        target = queries + (token * heads + head) * head_dim
        tl.store(target + at, turned_first.to(queries.dtype.element_ty), mask=inside)
        tl.store(target + half + at, turned_second.to(queries.dtype.element_ty), mask=inside)
    else:
        kv_head = (head - heads) % kv_heads
        row = tl.load(slots + token) + layer_row
        if is_value:
            row += block_size
        cached = pool + (row * kv_heads + kv_head) * head_dim
        tl.store(cached + at, turned_first.to(pool.dtype.element_ty), mask=inside)
        tl.store(cached + half + at, turned_second.to(pool.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights [head_dim] of the norms of queries and keys, and their epsilon."""

    queries: Tensor
    keys: Tensor
    epsilon: float


def rope_write(
    projected: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    slots: Tensor,
    norms: HeadNorms | None,
    queries: Tensor,
    pool: Tensor,
    layer: int,
) -> None:
    """Fills `queries` [tokens, heads, head_dim] and the pool's rows of these tokens.

    `projected` [tokens, (heads + 2 kv_heads) * head_dim], contiguous; `positions` int64 [tokens];
    `frequencies` float32 [head_dim / 2]; `slots` int64 [tokens] is each token's row of layer 0's K among the
    pool's token rows; `pool` [blocks, layers, 2, block_size, kv_heads, head_dim], contiguous.
    """
    tokens, heads, head_dim = queries.shape
    block_size, kv_heads = pool.shape[3], pool.shape[4]
    _rope_write[(tokens, heads + 2 * kv_heads)](
        projected, positions, frequencies, slots,
        projected if norms is None else norms.queries, projected if norms is None else norms.keys,
        queries, pool, heads, kv_heads, 2 * layer * block_size, 0.0 if norms is None else norms.epsilon,
        head_dim=head_dim, block_size=block_size, norms=norms is not None,
        half_width=triton.next_power_of_2(head_dim // 2), num_warps=1,
    )  # fmt: skip
