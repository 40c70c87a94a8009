"""Edge: matrix products with a model's weights, in the layout that is fastest on the device.

On an AMD EPYC (Zen 5) oneDNN beats the BLAS behind F.linear by 2 to 5 times at 2 to 512 rows. It reads
weights as they are stored, or reordered once: that is another 1.2 to 3 times faster below 32 rows but takes
private memory, while stored weights stay shared with the page cache and so with the machine's other workers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_REORDER_FOR_ROWS = 16


class Linear:
    """y = x W^T + b for one weight [out, in] and optional bias [out]; x is [rows, in], y [rows, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, reorder: bool) -> None:
        """`reorder` makes a private copy in oneDNN's layout; without oneDNN it has no effect."""
        self._bias = bias
        self._onednn: Any = onednn_for(weight)
        if self._onednn is not None and reorder:
            weight = self._onednn._reorder_linear_weight(weight.contiguous(), _REORDER_FOR_ROWS)
        self._weight = weight

    def __call__(self, rows: Tensor) -> Tensor:
        """The product; a view or a new tensor, never aliasing the input."""
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
