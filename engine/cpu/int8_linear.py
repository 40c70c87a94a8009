"""Edge: matrix products with weights of eight bits, on processors with instructions for them (VNNI).

Each output channel of a weight has a scale of its own, and so has each row that is multiplied, when it comes:
LLM.int8's vector-wise quantisation (Dettmers et al. 2022, section 2) without its outliers. A row's product
does not depend on the rows beside it.
"""

from typing import Any

import torch
from torch import Tensor

from tandem.errors import ConfigError

_LARGEST = 127
_ZERO_POINT = 128
"""oneDNN wants rows unsigned: 0 is stored as 128."""
_PACK_FOR_ROWS = 16


class Int8Linear:
    """Product whose weight is kept in eight bits only; rows and results are of the weight's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantises the weight. Raises ConfigError when this processor or torch cannot multiply bytes."""
        operators = _onednn()
        wide = weight.float()
        scales = _scales(wide)
        narrow = (wide / scales).round_().to(torch.int8)
        self._multiply: Any = operators.qlinear_pointwise
        self._weight = operators.qlinear_prepack(narrow, [_PACK_FOR_ROWS, weight.shape[1]])
        self._scales = scales.squeeze(1)
        self._zero_points = torch.zeros(weight.shape[0], dtype=torch.int32)
        self._bias = None if bias is None else bias.float()
        self._dtype = weight.dtype

    def __call__(self, rows: Tensor) -> Tensor:
        """See Product."""
        wide = rows.float()
        row_scales = _scales(wide)
        narrow = (wide / row_scales).add_(_ZERO_POINT + 0.5).to(torch.uint8)
        product: Tensor = self._multiply(
            *(narrow, 1.0, _ZERO_POINT, self._weight, self._scales, self._zero_points),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        if self._bias is None:
            return product.mul_(row_scales).to(self._dtype)
        return torch.addcmul(self._bias, product, row_scales).to(self._dtype)


def int8_linear(weight: Tensor, bias: Tensor | None) -> Int8Linear:
    """MakeProduct. Raises ConfigError as Int8Linear does."""
    return Int8Linear(weight, bias)


def _scales(rows: Tensor) -> Tensor:
    """[rows, 1]: what the largest number of each row is divided by to become 127; a row of zeros stays so."""
    return rows.abs().amax(dim=1, keepdim=True).clamp_(min=1e-20).div_(_LARGEST)


def _onednn() -> Any:
    operators = torch.ops.onednn
    if not torch.cpu._is_vnni_supported():
        raise ConfigError("weights_dtype int8 needs a processor with VNNI, which this one lacks; use auto.")
    if not hasattr(operators, "qlinear_prepack") or not hasattr(operators, "qlinear_pointwise"):
        raise ConfigError("weights_dtype int8 needs a torch with oneDNN's qlinear, which this one lacks.")
    return operators
