"""Edge: attention by FlashInfer, where it is installed.

It takes K and V as two tensors of pages [pages, page_size, kv_heads, head_dim] with equal strides; a layer's
part of our block-major pool is such a pair of views. Plans depend on the window, so layers with the
same one share a plan.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.cuda.attention import planned
from engine.cuda.batch import DeviceBatch
from engine.models.model_config import ModelConfig

_WORKSPACE_BYTES = 128 * 1024**2


class FlashInferAttention:
    """Paged prefill and decode wrappers; decode batches of a bucket's size use fixed buffers for graphs."""

    name = "flashinfer"
    graph_safe = True

    def __init__(
        self, pool: Tensor, config: ModelConfig, buckets: Sequence[int], table_width: int, library: Any = None
    ) -> None:
        """`library` is the flashinfer package. Raises ImportError when it is not installed."""
        self._library = import_module("flashinfer") if library is None else library
        self.pool = pool
        self._config = config
        self._table_width = table_width
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._prefill = {
            window: self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            for window in dict.fromkeys(config.windows)
        }
        self._decode = {
            (window, bucket): self._decode_wrapper(bucket)
            for window in dict.fromkeys(config.windows)
            for bucket in buckets
        }
        self._batch: DeviceBatch | None = None
        self._current: dict[int | None, Any] = {}

    def plan(self, batch: DeviceBatch) -> None:
        """See PagedAttention."""
        self._batch = batch
        host, block_size = batch.host, self.pool.shape[3]
        pages = -(-host.lengths // block_size)
        starts = _int32(np.concatenate([[0], np.cumsum(pages)]))
        indices = _int32(host.tables[np.arange(host.tables.shape[1]) < pages[:, None]])
        last = _int32((host.lengths - 1) % block_size + 1)
        rows = _int32([0, *(run.first_row + run.tokens for run in host.runs)])
        for window in dict.fromkeys(self._config.windows):
            wrapper = self._decode.get((window, len(host.runs))) if host.one_token_each else None
            if wrapper is None:
                wrapper = self._prefill[window]
                shape = {"head_dim_qk": self._config.head_dim, "causal": True}
                wrapper.plan(rows, starts, indices, last, **shape, **self._terms(window))
            else:
                wrapper.plan(starts, indices, last, head_dim=self._config.head_dim, **self._terms(window))
            self._current[window] = wrapper

    def attend(self, layer: int, queries: Tensor, out: Tensor) -> None:
        """See PagedAttention."""
        planned(self._batch)
        held = (self.pool[:, layer, 0], self.pool[:, layer, 1])
        self._current[self._config.windows[layer]].run(queries, held, out=out)

    def _decode_wrapper(self, bucket: int) -> Any:
        def fixed(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=self.pool.device)

        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self._config.heads // self._config.kv_heads >= 4,
            paged_kv_indptr_buffer=fixed(bucket + 1),
            paged_kv_indices_buffer=fixed(bucket * self._table_width),
            paged_kv_last_page_len_buffer=fixed(bucket),
        )

    def _terms(self, window: int | None) -> dict[str, Any]:
        return {
            "num_qo_heads": self._config.heads,
            "num_kv_heads": self._config.kv_heads,
            "page_size": self.pool.shape[3],
            "window_left": -1 if window is None else window - 1,
            "q_data_type": self.pool.dtype,
            "kv_data_type": self.pool.dtype,
        }


def _int32(numbers: Any) -> Tensor:
    """In host memory: a plan reads it there, and copies what the kernels need."""
    return torch.from_numpy(np.asarray(numbers, dtype=np.int32))
