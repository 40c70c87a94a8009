"""Edge: RMS norm, with the residual sum that comes before it, in one pass over the rows."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(hidden, delta, weight, out, columns, epsilon, adds: tl.constexpr, width: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < columns
    numbers = tl.load(hidden + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    if adds:
        numbers += tl.load(delta + row * columns + at, mask=inside, other=0.0).to(tl.float32)
        # The sum is rounded to the stored type before the norm, as two separate kernels would.
        rounded = numbers.to(hidden.dtype.element_ty)
        tl.store(hidden + row * columns + at, rounded, mask=inside)
        numbers = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(numbers * numbers, axis=0) / columns + epsilon)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, (numbers * scale * factor).to(out.dtype.element_ty), mask=inside)


def rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, out: Tensor) -> None:
    """out = norm(hidden + delta) * weight; hidden becomes hidden + delta.

    hidden, delta and out are contiguous [rows, columns], weight [columns]; sums are float32.
    """
    rows, columns = hidden.shape
    width = triton.next_power_of_2(columns)
    _rms_norm[(rows,)](
        hidden, hidden if delta is None else delta, weight, out, columns, epsilon,
        adds=delta is not None, width=width, num_warps=min(16, max(1, width // 256)),
    )  # fmt: skip
