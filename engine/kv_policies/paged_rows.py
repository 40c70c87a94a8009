"""Edge: a KV pool in host memory as the compiled loops see it, of float32 or of eight-bit rows."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kv_cache import KvCache
from engine.kv_policies import kernels
from engine.kv_policies.quantised_rows import dequantised
from engine.model_config import ModelConfig
from tandem.ids import BlockId

Places = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Blocks and offsets in them, each [tokens]."""


class PagedRows:
    """Writes and reads K and V of a pool; holds views of the cache and must not outlive it."""

    def __init__(self, cache: KvCache, config: ModelConfig) -> None:
        """`cache` holds torch.float32 or torch.int8."""
        self._pool = cache.pool
        self._config = config
        self.shape = (
            config.layers,
            cache.block_size,
            config.kv_heads,
            int(cache.pool.shape[-1]),
            config.head_dim,
        )
        self.scaled = int(cache.pool.dtype == torch.int8)
        flat = cache.pool.view(-1)
        self.numbers: NDArray[np.generic] = flat.numpy()
        self.scales: NDArray[np.float32] = (
            flat.view(torch.float32).numpy() if self.scaled else np.ones(1, np.float32)
        )

    @property
    def pool_view(self) -> tuple[tuple[int, ...], NDArray[np.generic], NDArray[np.float32], int]:
        """The leading arguments of the compiled loops: shape, numbers, scales, scaled."""
        return self.shape, self.numbers, self.scales, self.scaled

    def write(self, layer: int, places: Places, keys: Tensor, values: Tensor) -> None:
        """Stores one layer's K and V of some tokens, each [tokens, kv_heads, head_dim]."""
        blocks, offsets = places
        if self.scaled:
            for which, rows in enumerate((keys, values)):
                exact = rows.float().contiguous().numpy()
                kernels.store_scaled(
                    self.shape, self.numbers, self.scales, layer, which, blocks, offsets, exact
                )
            return
        at = torch.from_numpy(blocks), torch.from_numpy(offsets)
        self._pool[:, layer, 0].index_put_(at, keys)
        self._pool[:, layer, 1].index_put_(at, values)

    def read(self, layer: int, blocks: Sequence[BlockId]) -> tuple[Tensor, Tensor]:
        """One layer's K and V of whole blocks, each float32 [blocks * block_size, kv_heads, head_dim]."""
        rows = self._pool[torch.tensor(blocks, dtype=torch.int64), layer]
        exact = dequantised(rows) if self.scaled else rows
        keys, values = exact.unbind(1)  # each [blocks, block_size, kv_heads, head_dim]
        return keys.flatten(0, 1), values.flatten(0, 1)
