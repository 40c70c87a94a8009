"""Edge: matrix products with a model's weights, in the layouts that were chosen for them.

On an AMD EPYC (Zen 5) oneDNN beats the BLAS behind F.linear by 2 to 5 times at 2 to 512 rows. It reads
weights as they are stored, or reordered once: that is another 1.2 to 3 times faster below 32 rows but takes
private memory, while stored weights stay shared with the page cache and so with the machine's other workers.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cpu.layouts import Bands, Layout, Way, always

_REORDER_FOR_ROWS = 16


class Product(Protocol):
    """y = x W^T + b for one weight [out, in] and optional bias [out]."""

    def __call__(self, rows: Tensor) -> Tensor:
        """[rows, in] to [rows, out]: a new tensor that does not alias the input."""
        ...


MakeProduct = Callable[[Tensor, Tensor | None], Product]
"""From a weight [out, in] and its bias [out] to what multiplies by it."""


class Linear:
    """Product in float32 or bfloat16; rows pass one of several ways by their number."""

    def __init__(self, weight: Tensor, bias: Tensor | None, bands: Bands) -> None:
        """The weight is kept once in each layout that the bands need: shared as it is stored, else copied."""
        kept = {layout: _laid_out(weight, layout) for layout in {band.way.layout for band in bands}}
        self.packed = kept.get(Layout.PACKED)
        """oneDNN's reordered copy, where there is one."""
        self._bounds = [band.most_rows for band in bands if band.most_rows is not None]
        self._ways = tuple(_multiply(band.way, kept[band.way.layout], bias) for band in bands)

    def __call__(self, rows: Tensor) -> Tensor:
        """See Product."""
        return self._ways[bisect_left(self._bounds, rows.shape[0])](rows)


def stored_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """MakeProduct that copies nothing: a mapped weight stays mapped."""
    return Linear(weight, bias, always(Way.BLAS if onednn_for(weight) is None else Way.ONEDNN))


def packed_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """MakeProduct with oneDNN's own layout; without oneDNN the weight stays as it is stored."""
    return Linear(weight, bias, always(Way.BLAS if onednn_for(weight) is None else Way.PACKED))


def possible_ways(weight: Tensor) -> tuple[Way, ...]:
    """The ways that can multiply by this weight here."""
    return tuple(Way) if onednn_for(weight) is not None else (Way.BLAS, Way.TRANSPOSED)


def onednn_for(weight: Tensor) -> Any:
    """Torch's operators over oneDNN when they can multiply by this weight, else None."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return None
    operators = torch.ops.mkldnn
    if not hasattr(operators, "_linear_pointwise") or not hasattr(operators, "_reorder_linear_weight"):
        return None
    if weight.dtype == torch.bfloat16:
        return operators if operators._is_mkldnn_bf16_supported() else None
    return operators if weight.dtype == torch.float32 else None


def _laid_out(weight: Tensor, layout: Layout) -> Tensor:
    if layout is Layout.TRANSPOSED:
        return weight.t().contiguous()
    if layout is Layout.PACKED:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _REORDER_FOR_ROWS)
        return packed
    return weight


def _multiply(way: Way, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if way is Way.BLAS:
        return lambda rows: F.linear(rows, weight, bias)
    if way is Way.TRANSPOSED:
        return lambda rows: rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    pointwise = torch.ops.mkldnn._linear_pointwise
    return lambda rows: pointwise(rows, weight, bias, "none", [], "")
