"""The Triton kernels against float64 references, in the interpreter or, on a machine with a GPU, compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.cuda.kernels.activation import swiglu
from engine.cuda.kernels.draw import CHUNK, draw_tokens
from engine.cuda.kernels.norm import rms_norm
from engine.cuda.kernels.rope_write import HeadNorms, rope_write
from engine.sampling.token_weights import draw, filtered_weights
from tandem.sampling import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
DTYPES = [torch.float32, torch.bfloat16]
KERNELS, CAPABILITIES_AND_TYPES = 8, 4
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Relative to the largest number: a few roundings of the stored type."""


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def assert_near(actual: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    error = (actual.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-6)
    assert float(error) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [False, True])
@settings(max_examples=8)
@given(rows=st.integers(1, 5), columns=st.sampled_from([8, 96, 576, 1000]), seed=st.integers(0, 9))
def test_rms_norm(dtype: torch.dtype, adds: bool, rows: int, columns: int, seed: int) -> None:
    hidden, delta = (numbers(rows, columns, seed=seed + part, dtype=dtype) for part in (0, 10))
    weight = numbers(columns, seed=seed + 20, dtype=dtype)
    summed = hidden.double() + (delta.double() if adds else 0.0)
    out = torch.empty_like(hidden)
    rms_norm(hidden, delta if adds else None, weight, 1e-5, out)
    assert_near(hidden, summed, dtype)
    wide = hidden.double()
    assert_near(out, wide / (wide.pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt() * weight.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8)
@given(rows=st.integers(1, 5), columns=st.sampled_from([16, 1024, 1536, 2000]), seed=st.integers(0, 9))
def test_swiglu(dtype: torch.dtype, rows: int, columns: int, seed: int) -> None:
    gate_up = numbers(rows, 2 * columns, seed=seed, dtype=dtype) * 4
    gate, up = gate_up.double().chunk(2, dim=1)
    out = torch.empty((rows, columns), dtype=dtype, device=DEVICE)
    swiglu(gate_up, out)
    assert_near(out, gate * torch.sigmoid(gate) * up, dtype)


def reference_rotation(heads: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Float64 [tokens, heads, head_dim]; the first half of a head pairs with its second."""
    angles = (positions.double()[:, None] * frequencies.double())[:, None]
    first, second = heads.double().chunk(2, dim=2)
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=2
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@settings(max_examples=6)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([8, 64, 96]),
    layer=st.integers(0, 1),
    seed=st.integers(0, 9),
)
def test_rope_write(
    dtype: torch.dtype, has_norms: bool, kv_heads: int, group: int, head_dim: int, layer: int, seed: int
) -> None:
    """Queries and keys are turned, values are not; nothing but the tokens' own rows of the pool changes."""
    layers, block_size, blocks, heads = 2, 4, 3, kv_heads * group
    pool = numbers(blocks, layers, 2, block_size, kv_heads, head_dim, seed=seed, dtype=dtype)
    expected = pool.clone()
    positions = torch.tensor([0, 5, 300], device=DEVICE)
    places = [(2, 1), (0, 3), (1, 0)]
    slots = torch.tensor([b * layers * 2 * block_size + row for b, row in places], device=DEVICE)
    frequencies = 1.0 / 10_000 ** (torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    projected = numbers(3, (heads + 2 * kv_heads) * head_dim, seed=seed + 1, dtype=dtype)
    parts = projected.view(3, -1, head_dim)
    norms = None
    turned = parts[:, : heads + kv_heads].double()
    if has_norms:
        weights = [numbers(head_dim, seed=seed + part, dtype=dtype) for part in (2, 3)]
        norms = HeadNorms(weights[0], weights[1], 1e-6)
        factor = torch.cat([weights[0].expand(heads, -1), weights[1].expand(kv_heads, -1)]).double()
        turned = (turned / (turned.pow(2).mean(dim=2, keepdim=True) + 1e-6).sqrt() * factor).to(dtype)
    turned = reference_rotation(turned, positions, frequencies)
    for token, (block, row) in enumerate(places):
        expected[block, layer, 0, row] = turned[token, heads:].to(dtype)
        expected[block, layer, 1, row] = parts[token, heads + kv_heads :]
    queries = torch.empty((3, heads, head_dim), dtype=dtype, device=DEVICE)
    rope_write(projected, positions, frequencies, slots, norms, queries, pool, layer)
    tolerance = 2e-5 if dtype is torch.float32 else 2**-6
    assert float((queries.double() - turned[:, :heads]).abs().max()) <= tolerance * 4
    assert torch.allclose(pool.double(), expected.double(), rtol=tolerance, atol=tolerance)


VOCABULARIES = [10, CHUNK, CHUNK + 1, 3 * CHUNK + 77]


@settings(max_examples=12)
@given(
    rows=st.integers(1, 4),
    vocabulary=st.sampled_from(VOCABULARIES),
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_a_drawn_token_is_the_one_the_cpu_draws(
    rows: int, vocabulary: int, temperature: float, seed: int
) -> None:
    """Equal to token_weights.draw, but where the uniform lies within rounding of a token's border."""
    logits = numbers(rows, vocabulary, seed=seed) * 3
    uniforms = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    temperatures = torch.full((rows,), temperature, device=DEVICE)
    draw_tokens(logits, temperatures, uniforms.to(DEVICE), tokens)
    if temperature == 0.0:
        assert tokens.tolist() == logits.argmax(dim=1).tolist()
        return
    params = [SamplingParams(temperature=temperature)] * rows
    expected = draw(filtered_weights(logits.cpu(), params), uniforms.tolist()).tolist()
    for row, (token, other) in enumerate(zip(tokens.tolist(), expected, strict=True)):
        if token != other:
            weights = (logits[row].double().cpu() / max(temperature, 1e-6)).softmax(dim=0)
            border = float(weights[: max(token, other)].sum())
            assert abs(border - float(uniforms[row])) < 1e-6, (token, other)


def test_the_lowest_id_wins_among_equals_across_chunks() -> None:
    logits = torch.zeros((1, 2 * CHUNK), device=DEVICE)
    logits[0, [700, CHUNK + 3]] = 4.0
    tokens = torch.empty(1, dtype=torch.int64, device=DEVICE)
    draw_tokens(
        logits, torch.zeros(1, device=DEVICE), torch.zeros(1, dtype=torch.float64, device=DEVICE), tokens
    )
    assert tokens.tolist() == [700]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gives_no_token(bad: float) -> None:
    logits = torch.zeros((2, 100), device=DEVICE)
    logits[0, 40] = bad
    tokens = torch.empty(2, dtype=torch.int64, device=DEVICE)
    uniforms = torch.full((2,), 0.999, dtype=torch.float64, device=DEVICE)
    draw_tokens(logits, torch.ones(2, device=DEVICE), uniforms, tokens)
    assert tokens.tolist() == [-1, 99]


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 0.999999999])
def test_a_token_of_no_weight_is_never_drawn(uniform: float) -> None:
    logits = torch.full((1, 2 * CHUNK), float("-inf"), device=DEVICE)
    logits[0, [5, CHUNK + 9]] = 1.0
    tokens = torch.empty(1, dtype=torch.int64, device=DEVICE)
    draw_tokens(
        logits,
        torch.ones(1, device=DEVICE),
        torch.tensor([uniform], dtype=torch.float64, device=DEVICE),
        tokens,
    )
    assert tokens.item() == (5 if uniform < 0.5 else CHUNK + 9)


def test_kernels_compile_for_gpus() -> None:
    """In a process of its own: this one may run the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.cuda.compile_kernels"],
        cwd=Path(__file__).resolve().parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == KERNELS * CAPABILITIES_AND_TYPES
    assert all(line.endswith(" True") for line in lines)
