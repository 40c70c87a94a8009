"""The native product equals float64's, for every number of rows, and no row depends on those beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.cpu.linear import onednn_for, packed_linear
from engine.native.product import MOST_ROWS, PackedProduct, lies_in_tiles, with_few_rows
from engine.native.team import team_of_torch

pytestmark = pytest.mark.skipif(onednn_for(torch.zeros(1, 1)) is None, reason="needs torch with oneDNN")

torch.set_num_threads(1)

OUTPUTS, INPUTS = 192, 96


def weight(seed: int = 0) -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(seed))


def reordered(stored: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(stored, 16)
    return packed


def native(stored: Tensor, bias: Tensor | None, threads: int) -> PackedProduct:
    """Skips where oneDNN keeps this weight in another way, as it may on other processors."""
    packed = reordered(stored)
    if not lies_in_tiles(packed, stored):
        pytest.skip("oneDNN does not keep weights in tiles of 64 outputs on this processor")
    team = team_of_torch(threads)
    assert team is not None
    return PackedProduct(team, packed, stored, bias)


@given(st.integers(1, MOST_ROWS), st.booleans(), st.sampled_from([1, 2, 3]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_product_is_float64s_rounded(rows: int, biased: bool, threads: int, seed: int) -> None:
    stored, bias = weight(seed), torch.linspace(-3, 3, OUTPUTS) if biased else None
    left = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(seed))
    expected = left.double() @ stored.double().T + (0 if bias is None else bias.double())
    with torch.inference_mode():
        found = native(stored, bias, threads)(left)
    assert (found.double() - expected).abs().max() < 1e-4


@given(st.integers(1, MOST_ROWS), st.booleans(), st.sampled_from([1, 2, 3]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_bfloat16s_products_are_summed_in_float32(rows: int, biased: bool, threads: int, seed: int) -> None:
    stored = weight(seed).bfloat16()
    bias = torch.linspace(-3, 3, OUTPUTS).bfloat16() if biased else None
    left = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(seed)).bfloat16()
    expected = left.double() @ stored.double().T + (0 if bias is None else bias.double())
    with torch.inference_mode():
        found = native(stored, bias, threads)(left)
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() < 1e-4


@given(st.integers(1, MOST_ROWS), st.data())
@settings(max_examples=40, deadline=None)
def test_a_rows_product_is_the_same_alone_and_among_others(rows: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(0, rows - 1))
    left = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(rows))
    with torch.inference_mode():
        multiply = native(weight(), None, 2)
        assert torch.equal(multiply(left)[chosen], multiply(left[chosen : chosen + 1])[0])


def test_rows_with_gaps_between_them_are_read_where_they_are() -> None:
    left = torch.randn(4, 3 * INPUTS, generator=torch.Generator().manual_seed(0))[:, INPUTS : 2 * INPUTS]
    with torch.inference_mode():
        multiply = native(weight(), None, 1)
        assert torch.equal(multiply(left), multiply(left.contiguous()))


def test_another_weight_or_an_odd_shape_does_not_lie_in_tiles() -> None:
    with torch.inference_mode():
        packed = reordered(weight())
        assert not lies_in_tiles(packed, weight(seed=1))
        odd = weight()[:100].contiguous()
        assert not lies_in_tiles(reordered(odd), odd)


@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1])
def test_a_linear_layer_gives_the_same_natively_and_through_onednn(rows: int) -> None:
    left = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(rows))
    team = team_of_torch(1)
    assert team is not None
    with torch.inference_mode():
        found = [make(weight(), None)(left) for make in (with_few_rows(packed_linear, team), packed_linear)]
    assert (found[0] - found[1]).abs().max() < 1e-4
