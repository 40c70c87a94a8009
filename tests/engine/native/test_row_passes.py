"""Native passes over rows give what float64 gives, for any shape and on any number of threads."""

from functools import cache
from math import exp

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.cpu.rope import inverse_frequencies, rotation
from engine.cpu.row_passes import TorchRows
from engine.models.model_config import RopeConfig
from engine.native.kernels.arithmetic import exponential
from engine.native.row_passes import NativeRows
from engine.native.team import team_of_torch

EPSILON = 1e-5
FLOAT32_STEP = 2.0**-23
SHAPES = st.tuples(st.integers(1, 40), st.sampled_from([1, 7, 16, 64, 576, 4096]))

torch.set_num_threads(1)


@cache
def native_rows(threads: int) -> NativeRows:
    team = team_of_torch(threads)
    assert team is not None, "torch for Linux computes with OpenMP"
    return NativeRows(team, EPSILON)


def random(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def exact_norm(rows: Tensor, weight: Tensor) -> Tensor:
    wide = rows.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()


@given(SHAPES, st.sampled_from([1, 2]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_adding_and_the_norm_are_float64s_rounded(shape: tuple[int, int], threads: int, seed: int) -> None:
    rows, update, weight = random(seed, *shape), random(seed + 1, *shape), random(seed + 2, shape[1])
    total = rows + update
    normed = native_rows(threads).added(rows, update, weight)
    assert torch.equal(rows, total)
    expected = exact_norm(total, weight)
    assert (normed.double() - expected).abs().max() <= 8 * FLOAT32_STEP * expected.abs().max()
    assert torch.equal(native_rows(threads).normed(total, weight), normed)


@given(SHAPES, st.sampled_from([1, 2]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_gate_is_float64s_rounded(shape: tuple[int, int], threads: int, seed: int) -> None:
    both = 8 * random(seed, shape[0], 2 * shape[1])
    gate, up = both.double().chunk(2, dim=-1)
    expected = gate * gate.sigmoid() * up
    found = native_rows(threads).gated(both)
    assert ((found.double() - expected).abs() <= 8 * FLOAT32_STEP * expected.abs() + 1e-30).all()


@pytest.mark.parametrize("gate", [-1e30, -200.0, -88.5, 0.0, 88.5, 200.0, 1e30])
def test_a_gate_far_out_stays_finite(gate: float) -> None:
    both = torch.tensor([[gate, 1.0]])
    expected = TorchRows(EPSILON, torch.device("cpu")).gated(both)
    assert native_rows(1).gated(both) == pytest.approx(expected, abs=1e-6, rel=1e-6)


@given(
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from([2, 6, 64, 128]),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_heads_turn_as_torchs_do_and_others_stay(
    tokens: int, turning: int, others: int, head_dim: int, seed: int
) -> None:
    heads = random(seed, tokens, turning + others, head_dim)
    positions = torch.randint(0, 8192, (tokens,), generator=torch.Generator().manual_seed(seed))
    frequencies = inverse_frequencies(RopeConfig(10000.0), head_dim)
    cosine, sine = rotation(positions, frequencies, torch.float32)
    expected = TorchRows(EPSILON, torch.device("cpu")).turned(heads, turning, cosine, sine)
    rest = heads[:, turning:].clone()
    found = native_rows(2).turned(heads, turning, cosine, sine)
    assert (found - expected).abs().max() < 1e-6
    assert torch.equal(heads[:, turning:], rest)


@numba.njit  # type: ignore[untyped-decorator]
def compiled_exponential(number: float) -> float:
    return exponential(number)  # type: ignore[no-any-return]


@given(st.floats(-86.875, 87.875, width=32))
@settings(max_examples=500, deadline=None)
def test_exp_is_off_by_two_units_in_the_last_place_at_most(number: float) -> None:
    found = float(compiled_exponential(np.float32(number)))
    assert found == pytest.approx(exp(number), rel=2 * FLOAT32_STEP)
