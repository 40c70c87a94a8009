"""Edge: an outlier-aware four-bit codec after Oaken (ISCA'25).

Fixed thresholds split a group's numbers: the middle ones are shifted towards zero by their threshold, which
narrows their range, and kept in four bits (sign and eight steps) with a scale a side; the inner and outer
ones are kept in 16 bits, found by a bit map. A group has room for a sixteenth of its numbers as outliers, so
that the size is fixed: of more, the most extreme are kept and the others join the middle, whose scale then
grows to hold them.
"""

import torch
from torch import Tensor

from kvtransfer.codecs.contract import BlockShape, grouped, ungroup
from kvtransfer.codecs.thresholds import Thresholds
from tandem.errors import ConfigError

_STEPS = 7
_SCALE_BYTES = 8
_LARGEST_HALF = torch.finfo(torch.float16).max


class OutlierCodec:
    """name `oaken`; an encoded group is: two scales, the bit map, the 16-bit outliers, two numbers a byte."""

    name = "oaken"

    def __init__(self, shape: BlockShape, thresholds: Thresholds) -> None:
        """Raises ConfigError for a shape whose groups do not fill whole bytes."""
        if shape.group_elements % 16:
            raise ConfigError(
                f"codec oaken needs block_size x head_dim in sixteens, not {shape.group_elements}."
            )
        self._shape = shape
        self._capacity = shape.group_elements // 16
        self._thresholds = thresholds.values
        self.parameters = thresholds.digest
        self._map_end = _SCALE_BYTES + shape.group_elements // 8
        self._outliers_end = self._map_end + self._capacity * 2
        self._group_bytes = self._outliers_end + shape.group_elements // 2
        self.layer_bytes = self._group_bytes * shape.layer_groups
        self.encoded_bytes = shape.layers * self.layer_bytes

    def encode(self, blocks: Tensor, out: Tensor, first_layer: int = 0) -> None:
        """See Codec; numbers must be finite, outliers within the range of float16."""
        groups = grouped(blocks, self._shape)
        limits = self._limits(first_layer, blocks.shape[1])
        is_outlier, places = self._outliers(groups, limits)
        outliers = groups.gather(2, places).clamp_(-_LARGEST_HALF, _LARGEST_HALF).half()
        codes, scales = _middle(groups.masked_fill(is_outlier, 0.0), limits)
        parts = out.view(*groups.shape[:2], self._group_bytes)
        parts[..., :_SCALE_BYTES].copy_(scales.view(torch.uint8))
        parts[..., _SCALE_BYTES : self._map_end].copy_(_pack_bits(is_outlier))
        parts[..., self._map_end : self._outliers_end].copy_(outliers.view(torch.uint8))
        parts[..., self._outliers_end :].copy_(codes[..., 0::2] | (codes[..., 1::2] << 4))

    def decode(self, encoded: Tensor, out: Tensor, first_layer: int = 0) -> None:
        """See Codec."""
        limits = self._limits(first_layer, out.shape[1])
        parts = encoded.view(out.shape[0], len(limits), self._group_bytes)
        scales = parts[..., :_SCALE_BYTES].contiguous().view(torch.float32)
        is_outlier = _unpack_bits(parts[..., _SCALE_BYTES : self._map_end])
        outliers = parts[..., self._map_end : self._outliers_end].contiguous().view(torch.float16).float()
        packed = parts[..., self._outliers_end :]
        codes = torch.stack([packed & 15, packed >> 4], dim=3).flatten(2)
        middle = _unshift(codes, scales, limits)
        rank = is_outlier.cumsum(2).sub_(1).clamp_(0, self._capacity - 1)
        ungroup(torch.where(is_outlier, outliers.gather(2, rank), middle), self._shape, out)

    def _limits(self, first_layer: int, layers: int) -> Tensor:
        """The thresholds of the groups of some layers, float32 [layers * layer_groups, 4]."""
        size = self._shape.layer_groups
        return self._thresholds[first_layer * size : (first_layer + layers) * size]

    def _outliers(self, groups: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Which numbers are kept in 16 bits, and the places of `capacity` candidates in ascending order.

        The kept ones come first among the places, so that the i-th set bit is the i-th outlier.
        """
        low, inner_low, inner_high, high = limits[:, :, None].unbind(1)
        outer = torch.maximum(groups - high, low - groups)
        inner = torch.minimum(inner_high - groups, groups - inner_low)
        # An outer number left in the middle costs more than an inner one: outer ones are taken first.
        score = torch.where(outer > 0, outer + inner_high - inner_low, inner)
        best = score.topk(self._capacity, dim=2)
        elements = self._shape.group_elements
        places = torch.where(best.values > 0, best.indices, elements).sort(dim=2).values
        is_outlier = torch.zeros((*groups.shape[:2], elements + 1), dtype=torch.bool, device=groups.device)
        is_outlier.scatter_(2, places, torch.ones_like(places, dtype=torch.bool))
        return is_outlier[..., :elements], places.clamp_(max=elements - 1)


def _middle(groups: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Four-bit codes, uint8 [n, groups, elements], and scales [n, groups, 2] of the two sides."""
    inner_low, inner_high = limits[:, 1, None], limits[:, 2, None]
    above, below = (groups - inner_high).clamp_(min=0), (inner_low - groups).clamp_(min=0)
    scales = torch.stack([above.amax(dim=2), below.amax(dim=2)], dim=2) / _STEPS
    negative = groups < 0
    scale = torch.where(negative, scales[..., 1:], scales[..., :1])
    steps = torch.where(negative, below, above).div_(scale).nan_to_num_(0.0).round_().clamp_(0, _STEPS)
    return steps.to(torch.uint8) | (negative.to(torch.uint8) << 3), scales


def _unshift(codes: Tensor, scales: Tensor, limits: Tensor) -> Tensor:
    """The inverse of _middle, float32 [n, groups, elements]."""
    inner_low, inner_high = limits[:, 1, None], limits[:, 2, None]
    steps, negative = (codes & 7).float(), (codes >> 3).bool()
    return torch.where(negative, inner_low - steps * scales[..., 1:], inner_high + steps * scales[..., :1])


def _pack_bits(flags: Tensor) -> Tensor:
    """bool [..., 8 n] to uint8 [..., n], the first flag in the lowest bit."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    return (flags.view(*flags.shape[:-1], -1, 8).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor) -> Tensor:
    """The inverse of _pack_bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2).bool()
