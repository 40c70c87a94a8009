"""Edge: what the CUDA decoder asks of an attention back-end, and the ones that need no other library.

K and V of the batch's own tokens are in the pool before a layer attends.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from engine.attention import Span, hidden_keys
from engine.cuda.batch import DeviceBatch
from engine.cuda.kernels.paged_decode import DecodeScratch, paged_decode
from engine.cuda.kernels.paged_prefill import paged_prefill, tiles_of
from engine.models.model_config import ModelConfig


class PagedAttention(Protocol):
    """One way to attend over the pool; used from one thread."""

    @property
    def name(self) -> str:
        """Name in the log and in cluster.yaml."""
        ...

    @property
    def graph_safe(self) -> bool:
        """Whether a CUDA graph may hold `attend` for batches of one token a sequence."""
        ...

    @property
    def pool(self) -> Tensor:
        """The blocks that it attends over, as KvCache lays them out."""
        ...

    def plan(self, batch: DeviceBatch) -> None:
        """Prepares what all layers share; not part of a graph."""
        ...

    def attend(self, layer: int, queries: Tensor, out: Tensor) -> None:
        """Fills out [tokens, heads, head_dim], causally and within the layer's window."""
        ...


class TritonAttention:
    """Our own kernels: split decode for single tokens, tiles of queries for chunks."""

    name = "triton"
    graph_safe = True

    def __init__(self, pool: Tensor, config: ModelConfig, max_batch: int, splits: int = 8) -> None:
        """`splits` programs share a sequence's context; `max_batch` sizes their scratch."""
        self.pool = pool
        self._windows = config.windows
        self._scratch = DecodeScratch.allocate(max_batch, splits, config.heads, config.head_dim, pool.device)
        self._batch: DeviceBatch | None = None
        self._tiles: Tensor | None = None

    def plan(self, batch: DeviceBatch) -> None:
        """See PagedAttention. A batch larger than max_batch is attended as chunks of one token."""
        self._batch = batch
        small = len(batch.host.runs) <= self._scratch.sums.shape[0]
        alone = batch.host.one_token_each and small
        self._tiles = None if alone else tiles_of(batch.host.runs, self.pool.device)

    def attend(self, layer: int, queries: Tensor, out: Tensor) -> None:
        """See PagedAttention."""
        batch = planned(self._batch)
        window = self._windows[layer]
        if self._tiles is None:
            paged_decode(queries, self.pool, layer, batch.tables, batch.lengths, window, self._scratch, out)
        else:
            paged_prefill(queries, self.pool, layer, self._tiles, batch.tables, window, out)


class GatherAttention:
    """torch's attention on gathered K and V, one sequence at a time: slow, and right on every device.

    The only one for trees of guesses, whose branches do not see each other.
    """

    name = "sdpa"
    graph_safe = False

    def __init__(self, pool: Tensor, config: ModelConfig) -> None:
        self.pool = pool
        self._windows = config.windows
        self._batch: DeviceBatch | None = None

    def plan(self, batch: DeviceBatch) -> None:
        """See PagedAttention."""
        self._batch = batch

    def attend(self, layer: int, queries: Tensor, out: Tensor) -> None:
        """See PagedAttention."""
        batch = planned(self._batch)
        block_size, kv_heads, head_dim = self.pool.shape[3:]
        for run, tree in zip(batch.host.runs, batch.host.trees, strict=True):
            length = run.first_position + run.tokens
            blocks = batch.tables[run.sequence, : -(-length // block_size)]
            held = self.pool[blocks.long(), layer]  # [blocks, 2, block_size, kv_heads, head_dim]
            keys, values = held.transpose(0, 1).reshape(2, -1, kv_heads, head_dim)[:, :length].unbind(0)
            rows = slice(run.first_row, run.first_row + run.tokens)
            span = Span(run.first_row, run.tokens, run.first_position, (), tree)
            seen = ~hidden_keys(span, 0, self._windows[layer])
            attended = F.scaled_dot_product_attention(
                queries[rows].transpose(0, 1).unsqueeze(0),
                keys.transpose(0, 1).unsqueeze(0),
                values.transpose(0, 1).unsqueeze(0),
                attn_mask=seen.to(queries.device),
                enable_gqa=True,
            )
            out[rows] = attended.squeeze(0).transpose(0, 1)


def planned(batch: DeviceBatch | None) -> DeviceBatch:
    """The batch of the last `plan`. Raises RuntimeError when there was none."""
    if batch is None:
        raise RuntimeError("Attention was asked before a batch was planned.")
    return batch
