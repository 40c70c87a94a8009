"""Edge: what a decoder does to each row between two matrix products, and how torch's operators do it."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cpu.rope import rotate


class RowPasses(Protocol):
    """Passes over a batch's rows; called from one thread. What they return is valid until it is freed."""

    def normed(self, rows: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of rows [..., columns] over the last dimension, times weight [columns]."""
        ...

    def added(self, rows: Tensor, update: Tensor, weight: Tensor) -> Tensor:
        """Adds `update` to `rows` in place, both [tokens, columns]; returns the sum's norm as `normed`."""
        ...

    def turned(self, heads: Tensor, turning: int, cosine: Tensor, sine: Tensor) -> Tensor:
        """The first `turning` heads of [tokens, heads, head_dim], rotated; may overwrite them.

        Cosine and sine are rope.rotation's.
        """
        ...

    def gated(self, gate_up: Tensor) -> Tensor:
        """SwiGLU: silu of the first half of [tokens, 2 * columns] times the second, [tokens, columns]."""
        ...


class TorchRows:
    """RowPasses for every dtype and device."""

    def __init__(self, epsilon: float, device: torch.device) -> None:
        """`epsilon` is added to the mean square under the norm's root."""
        self._epsilon = torch.tensor(epsilon, device=device)

    def normed(self, rows: Tensor, weight: Tensor) -> Tensor:
        """See RowPasses; as F.rms_norm, in half as many passes."""
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, length, length, value=1 / weight.shape[0]).rsqrt_()
        return (rows * scale).to(rows.dtype).mul_(weight)

    def added(self, rows: Tensor, update: Tensor, weight: Tensor) -> Tensor:
        """See RowPasses."""
        return self.normed(rows.add_(update), weight)

    def turned(self, heads: Tensor, turning: int, cosine: Tensor, sine: Tensor) -> Tensor:
        """See RowPasses."""
        return rotate(heads[:, :turning], cosine, sine)

    def gated(self, gate_up: Tensor) -> Tensor:
        """See RowPasses."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
