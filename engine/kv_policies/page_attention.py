"""Edge: attention over float32 or eight-bit pages on the CPU, over all of them or those that Quest chooses.

Sequences that feed one token are attended by compiled loops that touch chosen pages only; longer spans see
all their pages, as prefill does in Quest (Tang et al. 2024, section 3.3). A token always sees K and V as they
are stored, so that it does not matter how its prompt was cut into chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engine.attention import Span, hidden_keys
from engine.kv_cache import KvCache
from engine.kv_policies import kernels
from engine.kv_policies.page_bounds import FULL_LAYERS, PageBounds
from engine.kv_policies.paged_rows import PagedRows, Places
from engine.linear import onednn_for
from engine.model_config import ModelConfig
from engine.tiled_attention import SHORTEST_SPAN, attend_tiles, plan_tiles
from tandem.ids import BlockId

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Singles:
    """Sequences that feed one token each."""

    rows: Tensor
    """Their rows in the batch, int64 [sequences]."""
    table: Indices
    """[sequences, blocks]; beyond a sequence's own blocks 0."""
    last_seen: Indices
    """Position of each one's token, [sequences]."""

    def first_seen(self, window: int | None) -> Indices:
        """The first position that each token sees, [sequences]."""
        if window is None:
            return np.zeros_like(self.last_seen)
        return np.maximum(self.last_seen - window + 1, 0)


class PageAttention:
    """AttentionBackend over a KvCache of float32 or int8 in host memory."""

    def __init__(self, cache: KvCache, config: ModelConfig, pages: int | None = None) -> None:
        """`pages` a KV head reads for a token in layers from FULL_LAYERS on, at least 1; None for all."""
        self._rows = PagedRows(cache, config)
        self._config = config
        self._pages = pages
        self._bounds = None if pages is None else PageBounds(self._rows, cache.num_blocks)
        self._onednn = onednn_for(torch.empty(0))
        self._compile()

    def begin_step(
        self, landed: Sequence[tuple[BlockId, int]], copies: Sequence[tuple[BlockId, BlockId]]
    ) -> None:
        """Hears of blocks that others wrote (block, tokens), and of copies (source, target) to come."""
        if self._bounds is not None:
            self._bounds.begin_step(landed, copies)

    def prepare(self, spans: Sequence[Span]) -> "PageBatchAttention":
        """See AttentionBackend."""
        size = self._rows.shape[1]
        blocks = [span.block_table[at // size] for span in spans for at in _slots(span)]
        offsets = [at % size for span in spans for at in _slots(span)]
        places = np.array(blocks, np.int64), np.array(offsets, np.int64)
        singles = [span for span in spans if span.tokens == 1]
        longer = tuple(span for span in spans if span.tokens > 1)
        return PageBatchAttention(self, places, _singles(singles, size) if singles else None, longer)

    def store(self, layer: int, places: Places, keys: Tensor, values: Tensor) -> None:
        """Writes K and V of a batch, and keeps the bounds of their blocks."""
        self._rows.write(layer, places, keys, values)
        if self._bounds is not None:
            self._bounds.extend(layer, places)

    def attend_singles(self, layer: int, singles: _Singles, queries: Tensor) -> Tensor:
        """queries [sequences, heads, head_dim] to float32 [sequences, heads * head_dim]."""
        window = self._config.windows[layer]
        seen = singles.first_seen(window), singles.last_seen
        own = queries.float().contiguous().numpy()
        pages, counts = self._choose(layer, singles, own, seen)
        attended = np.empty(own.shape, np.float32)
        kernels.attend_pages(*self._rows.pool_view, layer, own, singles.table, *seen, pages, counts, attended)
        return torch.from_numpy(attended).flatten(1)

    def attend_span(self, layer: int, span: Span, queries: Tensor) -> Tensor:
        """queries [tokens, heads, head_dim] to [tokens, heads * head_dim]."""
        window, size = self._config.windows[layer], self._rows.shape[1]
        first = 0 if window is None else max(0, span.start - window + 1) // size
        end = span.start + span.tokens
        visible = end - first * size
        blocks = span.block_table[first : -(-end // size)]
        keys, values = (rows[:visible] for rows in self._rows.read(layer, blocks))
        queries = queries.float()
        if self._onednn is not None and span.tokens >= SHORTEST_SPAN and not span.tree:
            tiles = plan_tiles(span.tokens, visible, window)
            return attend_tiles(self._onednn, tiles, queries, keys, values)
        attended = F.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=~hidden_keys(span, first * size, window),
            enable_gqa=True,
        )  # [1, heads, tokens, head_dim]
        return attended.squeeze(0).transpose(0, 1).reshape(span.tokens, -1)

    def _compile(self) -> None:
        """Runs every loop on nothing, so that the first step need not wait for the compiler."""
        none = np.empty(0, np.int64)
        nothing = torch.empty((0, self._config.kv_heads, self._config.head_dim))
        self._rows.write(0, (none, none), nothing, nothing)
        if self._bounds is not None:
            self._bounds.extend(FULL_LAYERS, (none, none))
        singles = _Singles(torch.empty(0, dtype=torch.int64), none.reshape(0, 0), none)
        self.attend_singles(self._config.layers - 1, singles, nothing)

    def _choose(
        self, layer: int, singles: _Singles, queries: NDArray[np.float32], seen: tuple[Indices, Indices]
    ) -> tuple[Indices, Indices]:
        """Pages [sequences, kv_heads, pages] and how many of them count; -1 stands for all that are seen."""
        sequences, kv_heads = len(queries), self._config.kv_heads
        counts = np.full((sequences, kv_heads), -1, np.int64)
        pages = np.empty((sequences, kv_heads, self._pages or 0), np.int64)
        if self._bounds is not None and layer >= FULL_LAYERS:
            bounds = self._bounds.bounds
            kernels.choose_pages(
                self._rows.shape, layer, queries, bounds, singles.table, *seen, pages, counts
            )
        return pages, counts


class PageBatchAttention:
    """BatchAttention of one prepared batch."""

    def __init__(
        self, attention: PageAttention, places: Places, singles: _Singles | None, longer: tuple[Span, ...]
    ) -> None:
        self._attention = attention
        self._places = places
        self._singles = singles
        self._longer = longer

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See BatchAttention."""
        self._attention.store(layer, self._places, keys, values)
        attended = torch.empty_like(queries, memory_format=torch.contiguous_format).flatten(1)
        if self._singles is not None:
            rows = self._singles.rows
            attended[rows] = self._attention.attend_singles(layer, self._singles, queries[rows]).to(
                attended.dtype
            )
        for span in self._longer:
            own = slice(span.first_row, span.first_row + span.tokens)
            attended[own] = self._attention.attend_span(layer, span, queries[own]).to(attended.dtype)
        return attended


def _slots(span: Span) -> range:
    return range(span.start, span.start + span.tokens)


def _singles(spans: Sequence[Span], size: int) -> _Singles:
    last_seen = np.array([span.start for span in spans], np.int64)
    table = np.zeros((len(spans), int(last_seen.max()) // size + 1), np.int64)
    for place, span in enumerate(spans):
        own = span.start // size + 1
        table[place, :own] = span.block_table[:own]
    rows = torch.tensor([span.first_row for span in spans], dtype=torch.int64)
    return _Singles(rows, table, last_seen)
