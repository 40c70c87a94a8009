"""Edge: SwiGLU on the joint gate-and-up projection."""

import triton
import triton.language as tl
from torch import Tensor

_WIDTH = 1024


@triton.jit
def _swiglu(gate_up, out, columns, width: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * width + tl.arange(0, width)
    inside = at < columns
    gate = tl.load(gate_up + row * 2 * columns + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * columns + columns + at, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * columns + at, product.to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """out [rows, columns] = silu(gate) * up for contiguous gate_up [rows, 2 columns], gate first."""
    rows, columns = out.shape
    _swiglu[(rows, triton.cdiv(columns, _WIDTH))](gate_up, out, columns, width=_WIDTH)
