"""Edge: what a wire codec promises: blocks in, a fixed number of bytes out, and back with a bounded error.

The encoded size of a block is fixed, so that encoded blocks lie in a pool of their own that every transport
moves as it moves any pool.
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

    @property
    def dimensions(self) -> tuple[int, int, int, int, int]:
        """The block as a tensor's shape."""
        return (self.layers, 2, self.block_size, self.kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of the block as the pool stores it."""
        return prod(self.dimensions) * self.dtype.itemsize

    @property
    def groups(self) -> int:
        """Scale groups of a block: one a layer, K or V, and head."""
        return self.layers * 2 * self.kv_heads

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
    def encoded_bytes(self) -> int:
        """Bytes of an encoded block."""
        ...

    def encode(self, blocks: Tensor, out: Tensor) -> None:
        """Writes blocks [n, layers, 2, block_size, kv_heads, head_dim] into uint8 out [n, encoded_bytes]."""
        ...

    def decode(self, encoded: Tensor, out: Tensor) -> None:
        """Writes what `encode` wrote, uint8 [n, encoded_bytes], back into blocks `out`."""
        ...


def grouped(blocks: Tensor, shape: BlockShape) -> Tensor:
    """Blocks as float32 [n, groups, group_elements]: a group is one layer's K or V of one head."""
    apart = blocks.permute(0, 1, 2, 4, 3, 5)
    return apart.reshape(blocks.shape[0], shape.groups, shape.group_elements).float()


def ungroup(groups: Tensor, shape: BlockShape, out: Tensor) -> None:
    """The inverse of `grouped`, into blocks of the shape's own type."""
    apart = groups.view(groups.shape[0], shape.layers, 2, shape.kv_heads, shape.block_size, shape.head_dim)
    out.copy_(apart.permute(0, 1, 2, 4, 3, 5))
