"""Edge: attention over float32 or eight-bit pages on the CPU: over all, those that Quest chooses, or watched.

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
from engine.cpu.linear import onednn_for
from engine.cpu.tiled_attention import SHORTEST_SPAN, attend_tiles, plan_tiles
from engine.kv.kv_cache import KvCache
from engine.kv_policies.bounded_kv import KvBudget
from engine.kv_policies.page_bounds import PageBounds
from engine.kv_policies.paged_rows import PagedRows, Places
from engine.kv_policies.recent_attention import RecentAttention
from engine.models.model_config import ModelConfig
from engine.native.kernels.pages import POOL_FIELDS, SEQUENCE_FIELDS, attend_pages
from engine.native.team import Team
from engine.step import StepPlan

Indices = NDArray[np.int64]

_ALONE_NUMBERS = 16384
"""With fewer numbers of K and V to read, handing half of them to another thread takes longer."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How tokens read KV: all pages where nothing is said.

    `pages` a K/V head in layers from FULL_LAYERS on, at least 1 (Quest). With a `budget` what they attend to
    is taken down (MorphKV); `largest` says how, see RecentAttention.
    """

    pages: int | None = None
    budget: KvBudget | None = None
    largest: bool = False


@dataclass(frozen=True, slots=True)
class _Singles:
    """Sequences that feed one token each, as the kernel wants them; the arrays keep the addresses valid."""

    fields: Indices
    """[sequences, SEQUENCE_FIELDS]"""
    tables: Indices
    """Their block tables, one after the other."""
    scores: tuple[Tensor, ...]
    """Of those that are watched."""
    reads: int
    """Tokens of all, those before them included."""


class PageAttention:
    """AttentionBackend over a KvCache of float32 or int8 in host memory."""

    def __init__(
        self, cache: KvCache, config: ModelConfig, team: Team, reading: Reading | None = None
    ) -> None:
        """`reading` None: a token reads all pages. `team`'s threads run the loops."""
        reading = reading or Reading()
        self._rows = PagedRows(cache, config, team)
        self._config = config
        self._attend = team.kernel(attend_pages, POOL_FIELDS + 14)
        self._pages = reading.pages
        self._bounds = None if reading.pages is None else PageBounds(self._rows, cache.num_blocks, team)
        self._recent = None
        if reading.budget is not None:
            self._recent = RecentAttention(self._rows, team, reading.budget, reading.largest)
        self._onednn = onednn_for(torch.empty(0))

    def begin_step(self, plan: StepPlan) -> None:
        """Hears of blocks that others wrote and of copies to come, and drops what the plan drops."""
        if self._bounds is not None:
            self._bounds.begin_step(plan.landed, plan.copies)
        if self._recent is not None:
            self._recent.begin_step(plan.drops)

    def prepare(self, spans: Sequence[Span]) -> "PageBatchAttention":
        """See AttentionBackend."""
        size = self._rows.shape[1]
        blocks = [span.block_table[at // size] for span in spans for at in _slots(span)]
        offsets = [at % size for span in spans for at in _slots(span)]
        places = Places(np.array(blocks, np.int64), np.array(offsets, np.int64))
        singles = [span for span in spans if span.tokens == 1]
        longer = tuple(span for span in spans if span.tokens > 1)
        return PageBatchAttention(self, places, self._singles(singles) if singles else None, longer)

    def store(self, layer: int, places: Places, keys: Tensor, values: Tensor) -> None:
        """Writes K and V of a batch, and keeps the bounds of their blocks."""
        bounds = None if self._bounds is None else self._bounds.of_layer(layer)
        self._rows.write(layer, places, keys, values, bounds)

    def attend_singles(self, layer: int, singles: _Singles, queries: Tensor, attended: Tensor) -> None:
        """Writes the rows of some sequences in `attended` [tokens, heads * head_dim].

        queries [tokens, heads, head_dim], the heads of a token contiguous; both float32.
        """
        bounds = None if self._bounds is None else self._bounds.of_layer(layer)
        numbers = 2 * singles.reads * self._config.kv_heads * self._config.head_dim
        run = self._attend.alone if numbers < _ALONE_NUMBERS else self._attend
        run(
            *self._rows.pool_arguments,
            layer,
            len(singles.fields),
            singles.fields.ctypes.data,
            singles.tables.ctypes.data,
            queries.data_ptr(),
            queries.stride(0),
            attended.data_ptr(),
            attended.stride(0),
            self._config.windows[layer] or 0,
            0 if bounds is None else bounds.data_ptr(),
            0 if bounds is None else bounds.shape[0],
            self._pages or 0,
            self._config.heads // self._config.kv_heads,
            int(self._recent is not None and self._recent.largest),
        )

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

    def _singles(self, spans: Sequence[Span]) -> _Singles:
        size = self._rows.shape[1]
        used = [span.start // size + 1 for span in spans]
        tables = np.array(
            [block for span, blocks in zip(spans, used, strict=True) for block in span.block_table[:blocks]],
            np.int64,
        )
        fields = np.zeros((len(spans), SEQUENCE_FIELDS), np.int64)
        fields[:, 0] = [span.first_row for span in spans]
        fields[:, 1] = [span.start for span in spans]
        fields[1:, 2] = np.cumsum(used)[:-1]
        watched: list[Tensor] = []
        for place, span in enumerate(spans):
            if self._recent is not None and span.bounded is not None and span.bounded.watched:
                scores = self._recent.scores(span.bounded.key, span.start + 1)
                fields[place, 3:] = scores.data_ptr(), scores.shape[2]
                watched.append(scores)
        return _Singles(fields, tables, tuple(watched), int(fields[:, 1].sum()) + len(spans))


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
        exact = queries.float()
        attended = torch.empty((queries.shape[0], queries.shape[1] * queries.shape[2]), dtype=torch.float32)
        if self._singles is not None:
            self._attention.attend_singles(layer, self._singles, exact, attended)
        for span in self._longer:
            own = slice(span.first_row, span.first_row + span.tokens)
            attended[own] = self._attention.attend_span(layer, span, exact[own])
        return attended.to(queries.dtype)


def _slots(span: Span) -> range:
    return range(span.start, span.start + span.tokens)
