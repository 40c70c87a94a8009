"""Edge: RowPasses in native loops, each one pass over the rows."""

import torch
from torch import Tensor

from engine.native.kernels import rows as kernels
from engine.native.team import Team

_ALONE_NUMBERS = 32768
"""With fewer numbers to go through, handing half to another thread gains little, and it may have no core."""


class NativeRows:
    """RowPasses for float32 on the CPU."""

    def __init__(self, team: Team, epsilon: float) -> None:
        """`epsilon` is added to the mean square under the norm's root."""
        self._norm = team.kernel(kernels.add_norm, 8)
        self._rotate = team.kernel(kernels.rotate, 8)
        self._gate = team.kernel(kernels.swiglu, 5)
        self._constants = torch.tensor([epsilon], dtype=torch.float32)
        self._epsilon = self._constants.data_ptr()

    def normed(self, rows: Tensor, weight: Tensor) -> Tensor:
        """See RowPasses."""
        rows = rows.contiguous()
        return self._add_norm(rows, 0, weight)

    def added(self, rows: Tensor, update: Tensor, weight: Tensor) -> Tensor:
        """See RowPasses; `rows` is contiguous."""
        update = update.contiguous()
        return self._add_norm(rows, update.data_ptr(), weight)

    def _add_norm(self, rows: Tensor, update: int, weight: Tensor) -> Tensor:
        out = torch.empty_like(rows)
        columns, numbers = rows.shape[-1], rows.numel()
        run = self._norm.alone if numbers < _ALONE_NUMBERS else self._norm
        run(
            rows.data_ptr(),
            update,
            weight.data_ptr(),
            out.data_ptr(),
            numbers // columns,
            columns,
            self._epsilon,
            0,
        )
        return out

    def turned(self, heads: Tensor, turning: int, cosine: Tensor, sine: Tensor) -> Tensor:
        """See RowPasses; each token's heads are contiguous, and are overwritten."""
        tokens, _, head_dim = heads.shape
        run = self._rotate.alone if tokens * turning * head_dim < _ALONE_NUMBERS else self._rotate
        rotation = cosine.data_ptr(), sine.data_ptr()
        run(heads.data_ptr(), *rotation, tokens, turning, head_dim, heads.stride(0), 0)
        return heads[:, :turning]

    def gated(self, gate_up: Tensor) -> Tensor:
        """See RowPasses; `gate_up` is contiguous."""
        tokens, columns = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((tokens, columns))
        run = self._gate.alone if tokens * columns < _ALONE_NUMBERS else self._gate
        run(gate_up.data_ptr(), out.data_ptr(), tokens, columns, 0)
        return out
