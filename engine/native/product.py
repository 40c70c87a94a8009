"""Edge: products of few rows with a weight that oneDNN has reordered, without oneDNN's work for each call."""

import ctypes

import torch
from torch import Tensor

from engine.linear import Linear, MakeProduct, Product
from engine.native.kernels.product import TILE, product
from engine.native.team import Team

MOST_ROWS = 32
"""Up to here it was measured to be faster than oneDNN, which keeps panels of many rows in the caches too."""


class PackedProduct:
    """y = x W^T + b in float32 for up to MOST_ROWS rows, over oneDNN's copy of the weight: no second one."""

    def __init__(self, team: Team, packed: Tensor, shape: tuple[int, int], bias: Tensor | None) -> None:
        """`packed` is oneDNN's tensor of a weight of `shape` [out, in], for which `lies_in_tiles` holds."""
        self._product = team.kernel(product, 9)
        self._packed = packed
        self._bias = bias
        self._outputs, self._inputs = shape
        self._weight_address = int(torch.ops.mkldnn.data_ptr(packed))
        self._bias_address = 0 if bias is None else bias.data_ptr()

    def __call__(self, rows: Tensor) -> Tensor:
        """[rows, in] to a new tensor [rows, out]."""
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        count = rows.shape[0]
        out = rows.new_empty((count, self._outputs))
        self._product(*self.arguments(rows, out))
        return out

    def arguments(self, rows: Tensor, out: Tensor) -> tuple[int, ...]:
        """The kernel's: rows [count, in] and out [count, out], whose last dimensions are dense."""
        return (
            rows.data_ptr(),
            rows.stride(0),
            self._weight_address,
            self._inputs,
            out.data_ptr(),
            out.stride(0),
            rows.shape[0],
            self._outputs // TILE,
            self._bias_address,
        )


def lies_in_tiles(packed: Tensor, weight: Tensor) -> bool:
    """Whether `packed`, oneDNN's reordered copy of `weight` [out, in], is [out / 64, in, 64] in memory.

    oneDNN chooses by processor and shape and promises nothing, so every number is compared.
    """
    operators = torch.ops.mkldnn
    if weight.dtype != torch.float32 or weight.shape[0] % TILE != 0 or not hasattr(operators, "data_ptr"):
        return False
    size = int(operators._nbytes(packed))
    if size != 4 * weight.numel():
        return False
    found = torch.frombuffer(
        (ctypes.c_char * size).from_address(int(operators.data_ptr(packed))), dtype=torch.float32
    )
    wanted = weight.contiguous().view(-1, TILE, weight.shape[1]).transpose(1, 2)
    return torch.equal(found.view(wanted.shape), wanted)


class FewRowsLinear:
    """Product whose few rows are multiplied natively, over the copy of the weight that oneDNN has."""

    def __init__(self, linear: Linear, native: PackedProduct) -> None:
        self.native = native
        self._linear = linear

    def __call__(self, rows: Tensor) -> Tensor:
        """See Product."""
        return self.native(rows) if rows.shape[0] <= MOST_ROWS else self._linear(rows)


def with_few_rows(make: MakeProduct, team: Team) -> MakeProduct:
    """MakeProduct that multiplies few rows natively wherever the layout of `make`'s weight allows it."""

    def linear(weight: Tensor, bias: Tensor | None) -> Product:
        made = make(weight, bias)
        if not isinstance(made, Linear) or made.packed is None or not lies_in_tiles(made.packed, weight):
            return made
        return FewRowsLinear(made, PackedProduct(team, made.packed, (weight.shape[0], weight.shape[1]), bias))

    return linear


def few_rows_of(product: Product) -> PackedProduct | None:
    """What multiplies a product's few rows, when a native loop does."""
    return product.native if isinstance(product, FewRowsLinear) else None
