"""Edge: what a wire codec promises: blocks in, a fixed number of bytes out, and back with a bounded error.

The encoded size of a layer of a block is fixed, and layers are written one after the other, none needing
another. So encoded blocks lie in a pool of their own that every transport moves as it moves any pool.
"""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Shape and type of one KV block: [layers, 2 (K and V), block_size, kv_heads, head_dim]."""

    layers: int
    block_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of_pool(cls, pool: Tensor) -> "BlockShape":
        """Of the blocks of a pool [num_blocks, layers, 2, block_size, kv_heads, head_dim]."""
        _, layers, _, block_size, kv_heads, head_dim = pool.shape
        return cls(layers, block_size, kv_heads, head_dim, pool.dtype)

    @property
    def dimensions(self) -> tuple[int, int, int, int, int]:
        """The block as a tensor's shape."""
        return (self.layers, 2, self.block_size, self.kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of the block as the pool stores it."""
        return prod(self.dimensions) * self.dtype.itemsize

    @property
    def layer_groups(self) -> int:
        """Scale groups of a layer of a block: one for K or V of each head."""
        return 2 * self.kv_heads

    @property
    def groups(self) -> int:
        """Scale groups of a block."""
        return self.layers * self.layer_groups

    @property
    def group_elements(self) -> int:
        """Numbers that share a scale."""
        return self.block_size * self.head_dim


class Codec(Protocol):
    """One way to write blocks of one shape; holds no state between calls and may be used from any thread."""

    @property
    def name(self) -> str:
        """Name in cluster.yaml; with `parameters` it enters the compatibility digest."""
        ...

    @property
    def parameters(self) -> str:
        """What both ends must have alike beside the name, as a short digest; empty for none."""
        ...

    @property
    def layer_bytes(self) -> int:
        """Bytes of one encoded layer of a block."""
        ...

    @property
    def encoded_bytes(self) -> int:
        """Bytes of an encoded block: layer_bytes for each of its layers."""
        ...

    def encode(self, blocks: Tensor, out: Tensor, first_layer: int = 0) -> None:
        """Writes the k layers from `first_layer` on into `out`, uint8 [n, k * layer_bytes], contiguous.

        `blocks` are these layers of n blocks: [n, k, 2, block_size, kv_heads, head_dim].
        """
        ...

    def decode(self, encoded: Tensor, out: Tensor, first_layer: int = 0) -> None:
        """Writes what `encode` wrote of the same layers back into their blocks `out`."""
        ...


def grouped(blocks: Tensor, shape: BlockShape) -> Tensor:
    """k layers of blocks as float32 [n, k * layer_groups, group_elements]: one group for K or V of a head."""
    apart = blocks.permute(0, 1, 2, 4, 3, 5)
    groups = blocks.shape[1] * shape.layer_groups
    return apart.reshape(blocks.shape[0], groups, shape.group_elements).float()


def ungroup(groups: Tensor, shape: BlockShape, out: Tensor) -> None:
    """The inverse of `grouped`, into layers of blocks of the shape's own type."""
    apart = groups.view(*out.shape[:3], shape.kv_heads, shape.block_size, shape.head_dim)
    out.copy_(apart.permute(0, 1, 2, 4, 3, 5))


@dataclass(frozen=True, slots=True)
class CodecReport:
    """Bytes of a block before and after, and the error of a round trip.

    Both errors are of the difference's magnitude, as a part of the largest magnitude of the number's group.
    """

    block_bytes: int
    encoded_bytes: int
    max_error: float
    mean_error: float


def report_on(codec: Codec, blocks: Tensor, shape: BlockShape) -> CodecReport:
    """What a codec makes of blocks [n, *shape.dimensions], n at least 1."""
    encoded = torch.empty((blocks.shape[0], codec.encoded_bytes), dtype=torch.uint8, device=blocks.device)
    decoded = torch.empty_like(blocks)
    codec.encode(blocks, encoded)
    codec.decode(encoded, decoded)
    before = grouped(blocks, shape)
    largest = before.abs().amax(dim=2, keepdim=True)
    errors = (grouped(decoded, shape) - before).abs().div_(largest).nan_to_num_(0.0)
    return CodecReport(
        shape.block_bytes, codec.encoded_bytes, float(errors.max().item()), float(errors.mean().item())
    )
