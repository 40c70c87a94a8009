"""Edge: which type the kernels multiply in."""

import torch
import triton


def wide_products(stored: torch.dtype) -> bool:
    """Whether matrix products take float32 operands instead of the stored type's tensor cores.

    Triton's interpreter has numpy's types, which lack bfloat16.
    """
    return stored is torch.float32 or bool(triton.knobs.runtime.interpret)
