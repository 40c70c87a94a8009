"""Edge: rows of eight-bit numbers, each with its scale behind it: how an int8 pool holds K and V.

A row is one head's K or V of one token. It has a scale of its own, as tokens come one by one: what is written
never has to be rounded a second time because a larger number comes.
"""

import torch
from torch import Tensor

from tandem.errors import ModelError

_SCALE_BYTES = 4


def quantised_row(head_dim: int) -> int:
    """Bytes of a row: head_dim int8 numbers, then a float32 scale. ModelError for an odd head_dim."""
    if head_dim % _SCALE_BYTES:
        raise ModelError(
            f"An int8 KV pool needs heads of a multiple of {_SCALE_BYTES} numbers, not {head_dim}."
        )
    return head_dim + _SCALE_BYTES


def dequantised(rows: Tensor) -> Tensor:
    """Rows int8 [..., quantised_row(head_dim)] to float32 [..., head_dim]: numbers times their scale."""
    numbers = rows[..., :-_SCALE_BYTES]
    scales = rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return numbers.float().mul_(scales)
