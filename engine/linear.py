"""Edge: matrix products with a model's weights, in the layout that is fastest on the device.

On an AMD EPYC (Zen 5) oneDNN beats the BLAS behind F.linear by 2 to 5 times at 2 to 512 rows. It reads
weights as they are stored, or reordered once: that is another 1.2 to 3 times faster below 32 rows but takes
private memory, while stored weights stay shared with the page cache and so with the machine's other workers.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from engine.native.product import PackedProduct
    from engine.native.team import Team

_REORDER_FOR_ROWS = 16


class Linear:
    """y = x W^T + b for one weight [out, in] and optional bias [out]; x is [rows, in], y [rows, out]."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, reorder: bool, team: "Team | None" = None
    ) -> None:
        """`reorder` makes a private copy in oneDNN's layout; without oneDNN it has no effect.

        With a `team`, few rows are multiplied by a native loop over that copy where its layout is known.
        """
        self._bias = bias
        self._onednn: Any = onednn_for(weight)
        self._native: PackedProduct | None = None
        self._native_rows = 0
        if self._onednn is not None and reorder:
            stored = weight.contiguous()
            weight = self._onednn._reorder_linear_weight(stored, _REORDER_FOR_ROWS)
            if team is not None:
                self._few_rows(team, weight, stored)
        self._weight = weight

    @property
    def native(self) -> "PackedProduct | None":
        """What multiplies few rows, when a native loop does."""
        return self._native

    def _few_rows(self, team: "Team", packed: Tensor, stored: Tensor) -> None:
        from engine.native.product import MOST_ROWS, PackedProduct, lies_in_tiles

        if lies_in_tiles(packed, stored):
            self._native = PackedProduct(team, packed, (stored.shape[0], stored.shape[1]), self._bias)
            self._native_rows = MOST_ROWS

    def __call__(self, rows: Tensor) -> Tensor:
        """The product; a view or a new tensor, never aliasing the input."""
        if self._native is not None and rows.shape[0] <= self._native_rows:
            return self._native(rows)
        if self._onednn is None:
            return F.linear(rows, self._weight, self._bias)
        product: Tensor = self._onednn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return product


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
