"""Edge: eight-bit codecs: each number divided by its group's scale, a group being one block's layer and head.

fp8 keeps a relative precision of 2^-4 over most of its range (OCP FP8 E4M3: 3 mantissa bits, largest 448);
int8 an absolute one of 1/254 of the group's largest magnitude.
"""

import torch
from torch import Tensor

from kvtransfer.codecs.contract import BlockShape, grouped, ungroup

_SCALE_BYTES = 4
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class ScaledCodec:
    """Symmetric: number = stored x scale; the scale lets the largest of a group be the largest storable.

    An encoded layer is: the scales of its groups, their numbers.
    """

    parameters = ""

    def __init__(self, name: str, shape: BlockShape, stored: torch.dtype, largest: float) -> None:
        """`stored` is a one-byte type whose largest number is `largest`."""
        self.name = name
        self._shape = shape
        self._stored = stored
        self._largest = largest
        self._scales_bytes = shape.layer_groups * _SCALE_BYTES
        self.layer_bytes = self._scales_bytes + shape.layer_groups * shape.group_elements
        self.encoded_bytes = shape.layers * self.layer_bytes

    def encode(self, blocks: Tensor, out: Tensor, first_layer: int = 0) -> None:
        """See Codec; numbers that are not finite are beyond its contract."""
        groups = grouped(blocks, self._shape)
        scales = (groups.abs().amax(dim=2) / self._largest).clamp_(min=_SMALLEST_SCALE)
        scaled = groups.div_(scales.unsqueeze(2)).clamp_(-self._largest, self._largest)
        if not self._stored.is_floating_point:
            scaled.round_()
        count, layers = blocks.shape[:2]
        parts = out.view(count, layers, self.layer_bytes)
        parts[..., : self._scales_bytes].copy_(scales.view(count, layers, -1).view(torch.uint8))
        parts[..., self._scales_bytes :].copy_(
            scaled.to(self._stored).view(count, layers, -1).view(torch.uint8)
        )

    def decode(self, encoded: Tensor, out: Tensor, first_layer: int = 0) -> None:
        """See Codec."""
        count, layers = out.shape[:2]
        parts = encoded.view(count, layers, self.layer_bytes)
        scales = parts[..., : self._scales_bytes].contiguous().view(torch.float32)
        stored = parts[..., self._scales_bytes :].contiguous().view(self._stored)
        groups = stored.view(count, layers * self._shape.layer_groups, -1).float()
        ungroup(groups.mul_(scales.view(count, -1, 1)), self._shape, out)


def fp8_codec(shape: BlockShape) -> ScaledCodec:
    """E4M3 with a scale a block, layer and head."""
    return ScaledCodec("fp8", shape, torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max)


def int8_codec(shape: BlockShape) -> ScaledCodec:
    """Eight-bit integers with a scale a block, layer and head."""
    return ScaledCodec("int8", shape, torch.int8, 127.0)
