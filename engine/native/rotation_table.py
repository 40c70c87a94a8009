"""Edge: cosines and sines of positions, kept for the next step."""

import torch
from torch import Tensor

from engine.cpu.rope import rotation

_LEAST_POSITIONS = 256


class RotationTable:
    """rope.rotation of the positions from 0 up to the furthest that was asked for; used from one thread."""

    def __init__(self, frequencies: Tensor) -> None:
        """`frequencies` are rope.inverse_frequencies', float32 [head_dim / 2]."""
        self._frequencies = frequencies
        self.cosine, self.sine = rotation(torch.arange(_LEAST_POSITIONS), frequencies, torch.float32)
        """Each [positions, 1, head_dim], float32; others after `reach` said so."""

    def reach(self, position: int) -> bool:
        """Covers a position; True when the tables are others now."""
        if position < len(self.cosine):
            return False
        positions = torch.arange(1 << position.bit_length())
        self.cosine, self.sine = rotation(positions, self._frequencies, torch.float32)
        return True
