"""Attention over the paged cache in Triton, against plain attention in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.cuda.kernels.paged_decode import DecodeScratch, paged_decode
from engine.cuda.kernels.paged_prefill import QueryRun, paged_prefill, tiles_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LAYERS, BLOCKS = 2, 24


def pool_of(kv_heads: int, head_dim: int, block_size: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (BLOCKS, LAYERS, 2, block_size, kv_heads, head_dim)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def block_table(blocks: int, seed: int) -> Tensor:
    return torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(seed))[:blocks]


def reference(query: Tensor, pool: Tensor, layer: int, table: Tensor, at: int, window: int | None) -> Tensor:
    """Float64 attention [heads, head_dim] of one query [heads, head_dim] at position `at`."""
    keys, values = pool[table.to(DEVICE), layer].double().unbind(1)
    heads, head_dim = query.shape
    first = 0 if window is None else max(0, at - window + 1)
    group = heads // pool.shape[4]
    keys, values = (
        part.reshape(-1, pool.shape[4], head_dim)[first : at + 1].repeat_interleave(group, dim=1)
        for part in (keys, values)
    )
    weights = (torch.einsum("hd,thd->ht", query.double(), keys) / head_dim**0.5).softmax(dim=1)
    return torch.einsum("ht,thd->hd", weights, values)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@settings(max_examples=8)
@given(
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 8]),
    head_dim=st.sampled_from([16, 64, 96]),
    block_size=st.sampled_from([4, 16]),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 7, 40]),
    splits=st.sampled_from([1, 3]),
    seed=st.integers(0, 9),
)
def test_decode(
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    lengths: list[int],
    window: int | None,
    splits: int,
    seed: int,
) -> None:
    """Whatever the lengths, the splits and the window; a padding sequence gives zeros and harms nobody."""
    pool = pool_of(kv_heads, head_dim, block_size, seed, dtype)
    heads, sequences = kv_heads * group, len(lengths) + 1
    tables = torch.stack([block_table(60 // block_size + 1, seed + at) for at in range(sequences)])
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn((sequences, heads, head_dim), generator=generator).to(dtype).to(DEVICE)
    out = torch.full_like(queries, float("nan"))
    scratch = DecodeScratch.allocate(sequences, splits, heads, head_dim, DEVICE)
    held = torch.tensor([*lengths, 0], dtype=torch.int32, device=DEVICE)
    paged_decode(queries, pool, 1, tables.to(DEVICE, torch.int32), held, window, scratch, out)
    for row, length in enumerate(lengths):
        expected = reference(queries[row], pool, 1, tables[row], length - 1, window)
        assert torch.allclose(out[row].double(), expected, atol=TOLERANCE[dtype])
    assert not out[-1].any()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@settings(max_examples=8)
@given(
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([16, 64]),
    block_size=st.sampled_from([4, 16]),
    runs=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 45)), min_size=1, max_size=2),
    window=st.sampled_from([None, 1, 20]),
    seed=st.integers(0, 9),
)
def test_prefill(
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    runs: list[tuple[int, int]],
    window: int | None,
    seed: int,
) -> None:
    """Chunks that continue a sequence see what came before, and every token itself and no later one."""
    pool = pool_of(kv_heads, head_dim, block_size, seed, dtype)
    heads = kv_heads * group
    tables = torch.stack([block_table(76 // block_size, seed + at) for at in range(len(runs))])
    rows, queried = 0, []
    for sequence, (start, tokens) in enumerate(runs):
        queried.append(QueryRun(sequence, rows, start, tokens))
        rows += tokens
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn((rows, heads, head_dim), generator=generator).to(dtype).to(DEVICE)
    out = torch.full_like(queries, float("nan"))
    tiles = tiles_of(queried, DEVICE)
    paged_prefill(queries, pool, 1, tiles, tables.to(DEVICE, torch.int32), window, out)
    for run in queried:
        for offset in {0, run.tokens // 2, run.tokens - 1}:
            row, at = run.first_row + offset, run.first_position + offset
            expected = reference(queries[row], pool, 1, tables[run.sequence], at, window)
            assert torch.allclose(out[row].double(), expected, atol=TOLERANCE[dtype])
    assert not out.isnan().any()
