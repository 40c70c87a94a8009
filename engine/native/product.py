"""Edge: products of few rows with a weight that oneDNN has reordered, without oneDNN's work for each call."""

import ctypes

import torch
from llvmlite.binding import get_host_cpu_features
from torch import Tensor

from engine.cpu.linear import Linear, MakeProduct, Product
from engine.native.kernels.product import TILE, product, product_halves
from engine.native.team import Team

MOST_ROWS = 32
"""Up to here it was measured to be faster than oneDNN, which keeps panels of many rows in the caches too."""


class PackedProduct:
    """y = x W^T + b for up to MOST_ROWS rows, over oneDNN's copy of the weight: no second one."""

    def __init__(self, team: Team, packed: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """`packed` is oneDNN's tensor of `weight` [out, in], for which `lies_in_tiles` holds."""
        halves = weight.dtype == torch.bfloat16
        self._product = team.kernel(product_halves if halves else product, 9)
        self._numbers = 2 if halves else 1
        self._packed = packed
        self._bias = None if bias is None else bias.float()
        self._outputs, self._inputs = weight.shape
        self._weight_address = int(torch.ops.mkldnn.data_ptr(packed))
        self._bias_address = 0 if self._bias is None else self._bias.data_ptr()

    def __call__(self, rows: Tensor) -> Tensor:
        """[rows, in] to a new float32 tensor [rows, out]."""
        if rows.stride(1) != 1 or rows.stride(0) % self._numbers != 0:
            rows = rows.contiguous()
        out = torch.empty((rows.shape[0], self._outputs), dtype=torch.float32)
        self._product(*self.arguments(rows, out))
        return out

    def arguments(self, rows: Tensor, out: Tensor) -> tuple[int, ...]:
        """The kernel's: rows [count, in] and float32 out [count, out], whose last dimensions are dense."""
        return (
            rows.data_ptr(),
            rows.stride(0) // self._numbers,
            self._weight_address,
            self._inputs // self._numbers,
            out.data_ptr(),
            out.stride(0),
            rows.shape[0],
            self._outputs // TILE,
            self._bias_address,
        )


def multiplies(dtype: torch.dtype) -> bool:
    """Whether native products can take weights of a type on this processor."""
    if dtype == torch.bfloat16:
        return bool(get_host_cpu_features().get("avx512bf16", False))
    return dtype == torch.float32


def lies_in_tiles(packed: Tensor, weight: Tensor) -> bool:
    """Whether `packed`, oneDNN's reordered copy of `weight` [out, in], is in memory as the kernels want it.

    oneDNN chooses by processor and shape and promises nothing, so every number is compared.
    """
    operators = torch.ops.mkldnn
    numbers = 4 // weight.dtype.itemsize
    outputs, inputs = weight.shape
    if outputs % TILE != 0 or inputs % numbers != 0 or not hasattr(operators, "data_ptr"):
        return False
    size = int(operators._nbytes(packed))
    if not multiplies(weight.dtype) or size != weight.dtype.itemsize * weight.numel():
        return False
    found = torch.frombuffer(
        (ctypes.c_char * size).from_address(int(operators.data_ptr(packed))), dtype=weight.dtype
    )
    wanted = weight.reshape(-1, TILE, inputs // numbers, numbers).transpose(1, 2)
    return torch.equal(found.view(wanted.shape), wanted)


class FewRowsLinear:
    """Product whose few rows are multiplied natively, over the copy of the weight that oneDNN has."""

    def __init__(self, linear: Linear, native: PackedProduct) -> None:
        self.native = native
        self._linear = linear

    def __call__(self, rows: Tensor) -> Tensor:
        """See Product."""
        return self.native(rows).to(rows.dtype) if rows.shape[0] <= MOST_ROWS else self._linear(rows)

    def wide(self, rows: Tensor) -> Tensor:
        """The product in float32, whatever the weight's type."""
        return self.native(rows) if rows.shape[0] <= MOST_ROWS else self._linear(rows).float()


def with_few_rows(make: MakeProduct, team: Team) -> MakeProduct:
    """MakeProduct that multiplies few rows natively wherever the layout of `make`'s weight allows it."""

    def linear(weight: Tensor, bias: Tensor | None) -> Product:
        made = make(weight, bias)
        if not isinstance(made, Linear) or made.packed is None or not lies_in_tiles(made.packed, weight):
            return made
        return FewRowsLinear(made, PackedProduct(team, made.packed, weight, bias))

    return linear


def few_rows_of(product: Product) -> PackedProduct | None:
    """What multiplies a product's few rows, when a native loop does."""
    return product.native if isinstance(product, FewRowsLinear) else None
