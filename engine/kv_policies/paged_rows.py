"""Edge: a KV pool in host memory as the compiled loops see it, of float32 or of eight-bit rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kv.kv_cache import KvCache
from engine.kv_policies.quantised_rows import dequantised
from engine.models.model_config import ModelConfig
from engine.native.kernels.pages import POOL_FIELDS, store_tokens
from engine.native.team import Team
from tandem.ids import BlockId

_ALONE_NUMBERS = 16384
"""With fewer numbers to write, handing half of them to another thread takes longer."""


@dataclass(frozen=True, slots=True)
class Places:
    """Blocks and offsets in them, each int64 [tokens], contiguous."""

    blocks: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def arguments(self) -> tuple[int, int, int]:
        """How many they are, and where, for a kernel; valid while this object is."""
        return len(self.blocks), self.blocks.ctypes.data, self.offsets.ctypes.data


class PagedRows:
    """Writes and reads K and V of a pool; holds views of the cache and must not outlive it."""

    def __init__(self, cache: KvCache, config: ModelConfig, team: Team) -> None:
        """`cache` holds torch.float32 or torch.int8."""
        self._pool = cache.pool
        self._store = team.kernel(store_tokens, POOL_FIELDS + 10)
        self.shape = (
            config.layers,
            cache.block_size,
            config.kv_heads,
            int(cache.pool.shape[-1]),
            config.head_dim,
        )
        self._scaled = cache.pool.dtype == torch.int8
        self._scales = cache.pool.view(-1).view(torch.float32) if self._scaled else torch.ones(1)
        self.pool_arguments: tuple[int, ...] = (
            cache.pool.data_ptr(),
            self._scales.data_ptr(),
            cache.pool.numel(),
            self._scales.numel(),
            int(self._scaled),
            *self.shape,
        )
        """The leading arguments of the kernels."""

    def write(
        self, layer: int, places: Places, keys: Tensor, values: Tensor, bounds: Tensor | None = None
    ) -> None:
        """Stores one layer's K and V of some tokens, each [tokens, kv_heads, head_dim].

        A token's heads are contiguous. Takes the keys into `bounds`, if given: float32 [num_blocks, layers,
        kv_heads, 2, head_dim].
        """
        exact = keys.float(), values.float()
        run = self._store.alone if exact[0].numel() < _ALONE_NUMBERS else self._store
        run(
            *self.pool_arguments,
            layer,
            *places.arguments,
            *(rows.data_ptr() for rows in exact),
            *(rows.stride(0) for rows in exact),
            0 if bounds is None else bounds.data_ptr(),
            0 if bounds is None else bounds.shape[0],
        )

    def read(self, layer: int, blocks: Sequence[BlockId]) -> tuple[Tensor, Tensor]:
        """One layer's K and V of whole blocks, each float32 [blocks * block_size, kv_heads, head_dim]."""
        rows = self._pool[torch.tensor(blocks, dtype=torch.int64), layer]
        exact = dequantised(rows) if self._scaled else rows
        keys, values = exact.unbind(1)  # each [blocks, block_size, kv_heads, head_dim]
        return keys.flatten(0, 1), values.flatten(0, 1)
