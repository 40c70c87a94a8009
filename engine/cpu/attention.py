"""Edge: attention over the paged cache on the CPU.

Spans of few tokens go to a native loop that reads blocks in place, where there is one. Otherwise sequences
that feed one token are gathered into padded rectangles and attended together. Longer spans go one by one,
long ones in tiles. Query heads of a group share their K/V head: nothing is repeated in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import Span, hidden_keys
from engine.cpu.linear import onednn_for
from engine.cpu.tiled_attention import SHORTEST_SPAN, Tile, attend_tiles, plan_tiles
from engine.kv.kv_cache import KvCache
from engine.models.model_config import ModelConfig

if TYPE_CHECKING:
    from engine.native.attention import NativeAttention, ShortSpans
    from engine.native.team import Team

_MAX_PADDING_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """Sequences that feed one token each, padded to the longest of them."""

    rows: Tensor | None
    """Their rows in the batch, int64 [sequences]; None when they are the whole batch in order."""
    gather: Tensor
    """Index of each visible block's first cache row, int64 [sequences * blocks]."""
    mask: Tensor | None
    """0 or -inf, [sequences, 1, 1, tokens]; None when every sequence fills the rectangle."""
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class _Stretch:
    """One span of several tokens."""

    first_row: int
    tokens: int
    gather: Tensor | None
    """As in _Rectangle; None when the span starts its sequence, so that its own K and V are all there is."""
    visible: int
    """Tokens whose K and V take part, counted from the first gathered block."""
    mask: Tensor | None
    """0 or -inf, [tokens, visible]; None for a plain causal triangle, or with tiles."""
    tiles: tuple[Tile, ...] = ()
    """Not empty when the span is attended in tiles."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """The work of one layer kind: a batch split by how it is attended."""

    rectangles: tuple[_Rectangle, ...]
    stretches: tuple[_Stretch, ...]


@dataclass(frozen=True, slots=True)
class _Writes:
    """Which K and V torch's operators store, and where."""

    slots: Tensor
    """Rows of layer 0's K among the cache's token rows, int64."""
    rows: Tensor | None
    """Rows of the batch, int64; None when they are all of them."""

    def of(self, tensor: Tensor) -> Tensor:
        """Those rows of [tokens, kv_heads, head_dim], flat."""
        return (tensor if self.rows is None else tensor[self.rows]).reshape(len(self.slots), -1)


@dataclass(frozen=True, slots=True)
class NativeSpans:
    """Spans of a batch that the native loop stores and attends."""

    attention: "NativeAttention"
    spans: "ShortSpans"


@dataclass(frozen=True, slots=True)
class _LayerRows:
    """One layer's part of the pool, as rows that start at its first token or block.

    A block's rows are 2 * layers * block_size token rows, or 2 * layers block rows, after the block before.
    """

    key_tokens: Tensor
    """[rows, kv_heads * head_dim]"""
    value_tokens: Tensor
    key_blocks: Tensor
    """[rows, block_size * kv_heads * head_dim]"""
    value_blocks: Tensor

    @staticmethod
    def of(cache: KvCache, layer: int) -> "_LayerRows":
        """Views only; they must not outlive the cache."""
        size, kv_heads, head_dim = cache.pool.shape[-3:]
        tokens = cache.pool.view(-1, kv_heads * head_dim)
        blocks = cache.pool.view(-1, size * kv_heads * head_dim)
        first = 2 * layer
        return _LayerRows(
            tokens[first * size :], tokens[(first + 1) * size :], blocks[first:], blocks[first + 1 :]
        )


class CpuAttention:
    """AttentionBackend over a KvCache in host memory."""

    def __init__(self, cache: KvCache, config: ModelConfig, team: "Team | None" = None) -> None:
        """With a `team`, which takes a float32 or bfloat16 pool, native loops do what they can."""
        self._cache = cache
        self._windows = config.windows
        self._layers = config.layers
        self._block_size = cache.block_size
        self._rows = tuple(_LayerRows.of(cache, layer) for layer in range(config.layers))
        # Its low-precision products would round the probabilities; torch's fused kernel does not.
        self._onednn = onednn_for(cache.pool) if cache.pool.dtype == torch.float32 else None
        self._scratch = _Scratch(config.kv_heads * config.head_dim * cache.block_size, cache.pool.dtype)
        self._native = None if team is None else _native_attention(team, cache, config)
        no_rows = torch.empty(0, dtype=torch.int64)
        self._nothing = _Writes(no_rows, no_rows), (_Plan((), ()),) * config.layers

    def prepare(self, spans: Sequence[Span]) -> "CpuBatchAttention":
        """See AttentionBackend."""
        if self._native is None:
            return self._batch(spans, None, None)
        short = [span for span in spans if self._native.covers(span)]
        if not short:
            return self._batch(spans, None, None)
        if len(short) == len(spans):
            native = NativeSpans(self._native, self._native.plan(short))
            return CpuBatchAttention(self._rows, self._scratch, *self._nothing, self._onednn, native)
        rest = [span for span in spans if not self._native.covers(span)]
        rows = torch.tensor([row for span in rest for row in span.rows()], dtype=torch.int64)
        return self._batch(rest, rows, NativeSpans(self._native, self._native.plan(short)))

    def _batch(
        self, spans: Sequence[Span], rows: Tensor | None, native: "NativeSpans | None"
    ) -> "CpuBatchAttention":
        """`rows` of the batch are those of the spans, None: all."""
        slots = torch.tensor([slot for span in spans for slot in self._slots(span)], dtype=torch.int64)
        plans = {window: self._plan(spans, window) for window in dict.fromkeys(self._windows)}
        by_layer = tuple(plans[window] for window in self._windows)
        writes = _Writes(slots, rows)
        return CpuBatchAttention(self._rows, self._scratch, writes, by_layer, self._onednn, native)

    def _slots(self, span: Span) -> list[int]:
        """Row of layer 0's K for each of the span's tokens, among the cache's token rows."""
        stride, size = self._layers * 2 * self._block_size, self._block_size
        positions = range(span.start, span.start + span.tokens)
        return [span.block_table[at // size] * stride + at % size for at in positions]

    def _plan(self, spans: Sequence[Span], window: int | None) -> _Plan:
        singles = [span for span in spans if span.tokens == 1]
        groups = group_by_length([self._visible_blocks(span, window) for span in singles])
        whole = len(groups) == 1 and len(singles) == len(spans)
        rectangles = tuple(
            self._rectangle([singles[index] for index in group], window, whole) for group in groups
        )
        stretches = tuple(self._stretch(span, window) for span in spans if span.tokens > 1)
        return _Plan(rectangles, stretches)

    def _visible_blocks(self, span: Span, window: int | None) -> int:
        return span.start // self._block_size - self._first_block(span, window) + 1

    def _first_block(self, span: Span, window: int | None) -> int:
        """First block that the span's first token can see."""
        return 0 if window is None else max(0, span.start - window + 1) // self._block_size

    def _rectangle(self, spans: list[Span], window: int | None, whole: bool) -> _Rectangle:
        size, stride = self._block_size, self._layers * 2
        width = max(self._visible_blocks(span, window) for span in spans)
        gather, first_visible, end = [], [], []
        for span in spans:
            first, last = self._first_block(span, window), span.start // size
            blocks = [block * stride for block in span.block_table[first : last + 1]]
            gather += blocks + blocks[-1:] * (width - len(blocks))
            first_visible.append(0 if window is None else max(0, span.start - window + 1) - first * size)
            end.append(span.start - first * size)
        tokens = max(end) + 1
        mask = None
        if min(end) + 1 < tokens or max(first_visible) > 0:
            at = torch.arange(tokens)
            hidden = (at > torch.tensor(end)[:, None]) | (at < torch.tensor(first_visible)[:, None])
            mask = _masked(hidden, self._cache.pool.dtype)[:, None, None]
        rows = None if whole else torch.tensor([span.first_row for span in spans], dtype=torch.int64)
        return _Rectangle(rows, torch.tensor(gather, dtype=torch.int64), mask, len(spans), tokens)

    def _stretch(self, span: Span, window: int | None) -> _Stretch:
        tiled = self._onednn is not None and span.tokens >= SHORTEST_SPAN and not span.tree
        if span.start == 0 and not span.tree and (tiled or window is None or span.tokens <= window):
            tiles = plan_tiles(span.tokens, span.tokens, window) if tiled else ()
            return _Stretch(span.first_row, span.tokens, None, span.tokens, None, tiles)
        size, stride = self._block_size, self._layers * 2
        first, last = self._first_block(span, window), (span.start + span.tokens - 1) // size
        gather = torch.tensor([block * stride for block in span.block_table[first : last + 1]])
        visible = span.start + span.tokens - first * size
        if tiled:
            tiles = plan_tiles(span.tokens, visible, window)
            return _Stretch(span.first_row, span.tokens, gather, visible, None, tiles)
        hidden = hidden_keys(span, first * size, window)
        mask = _masked(hidden, self._cache.pool.dtype)
        return _Stretch(span.first_row, span.tokens, gather, visible, mask)


def _native_attention(team: "Team", cache: KvCache, config: ModelConfig) -> "NativeAttention":
    """Imported late: who has no team needs no compiler."""
    from engine.native.attention import NativeAttention

    return NativeAttention(team, cache, config)


class CpuBatchAttention:
    """BatchAttention of one prepared batch."""

    def __init__(
        self,
        rows: Sequence["_LayerRows"],
        scratch: "_Scratch",
        writes: _Writes,
        plans: tuple[_Plan, ...],
        onednn: Any,
        native: NativeSpans | None,
    ) -> None:
        self._rows = rows
        self._scratch = scratch
        self._writes = writes
        self._plans = plans
        self._onednn = onednn
        self._native = native

    @property
    def native(self) -> NativeSpans | None:
        """The batch's spans when the native loop takes all of them."""
        return self._native if len(self._writes.slots) == 0 else None

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See BatchAttention."""
        plan = self._plans[layer]
        self._store(layer, keys, values)
        if len(plan.rectangles) == 1 and plan.rectangles[0].rows is None:
            return self._attend_rectangle(layer, plan.rectangles[0], queries, keys)
        attended = torch.empty_like(queries, memory_format=torch.contiguous_format).view(queries.shape[0], -1)
        if self._native is not None:
            self._native.attention.run(self._native.spans, layer, queries, keys, values, attended)
        for rectangle in plan.rectangles:
            attended[rectangle.rows] = self._attend_rectangle(layer, rectangle, queries[rectangle.rows], keys)
        for stretch in plan.stretches:
            rows = slice(stretch.first_row, stretch.first_row + stretch.tokens)
            attended[rows] = self._attend_stretch(layer, stretch, queries[rows], keys[rows], values[rows])
        return attended

    def _store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        writes, cached = self._writes, self._rows[layer]
        if len(writes.slots) > 0:
            cached.key_tokens.index_copy_(0, writes.slots, writes.of(keys))
            cached.value_tokens.index_copy_(0, writes.slots, writes.of(values))

    def _attend_rectangle(self, layer: int, part: _Rectangle, queries: Tensor, keys: Tensor) -> Tensor:
        """queries [sequences, heads, head_dim] to [sequences, heads * head_dim]."""
        shape = (part.sequences, -1, *keys.shape[1:])
        cached_keys, cached_values = (
            rows.view(shape)[:, : part.tokens].transpose(1, 2) for rows in self._gather(layer, part.gather)
        )  # [sequences, kv_heads, tokens, head_dim]
        attended = F.scaled_dot_product_attention(
            queries.unsqueeze(2), cached_keys, cached_values, attn_mask=part.mask, enable_gqa=True
        )
        return attended.reshape(part.sequences, -1)

    def _attend_stretch(
        self, layer: int, part: _Stretch, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """queries [tokens, heads, head_dim] to [tokens, heads * head_dim]."""
        if part.gather is not None:
            shape = (-1, *keys.shape[1:])
            keys, values = (rows.view(shape)[: part.visible] for rows in self._gather(layer, part.gather))
        if part.tiles:
            return attend_tiles(self._onednn, part.tiles, queries, keys, values)
        attended = F.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=part.mask,
            is_causal=part.mask is None,
            enable_gqa=True,
        )  # [1, heads, tokens, head_dim]
        return attended.squeeze(0).transpose(0, 1).reshape(part.tokens, -1)

    def _gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of a layer for some blocks, each [blocks, block_size * kv_heads * head_dim], in scratch."""
        keys, values = self._scratch.pair(blocks.shape[0])
        torch.index_select(self._rows[layer].key_blocks, 0, blocks, out=keys)
        torch.index_select(self._rows[layer].value_blocks, 0, blocks, out=values)
        return keys, values


class _Scratch:
    """Two growing buffers for gathered K and V: fresh ones for each layer would cost page faults."""

    def __init__(self, row_elements: int, dtype: torch.dtype) -> None:
        self._row_elements = row_elements
        self._dtype = dtype
        self._rows = 0
        self._buffers = self._allocate(0)

    def pair(self, rows: int) -> tuple[Tensor, Tensor]:
        """Two tensors [rows, row_elements], valid until the next call."""
        if rows > self._rows:
            self._rows = rows
            self._buffers = self._allocate(rows)
        keys, values = self._buffers
        return keys[:rows], values[:rows]

    def _allocate(self, rows: int) -> tuple[Tensor, Tensor]:
        shape = (rows, self._row_elements)
        return torch.empty(shape, dtype=self._dtype), torch.empty(shape, dtype=self._dtype)


def group_by_length(blocks: Sequence[int]) -> list[list[int]]:
    """Splits indices into groups of similar lengths, shortest first.

    A group's sequences are padded to its longest; a new group starts where padding would exceed 64 blocks.
    """
    groups: list[list[int]] = []
    padding = 0
    previous = 0
    for index in sorted(range(len(blocks)), key=lambda index: blocks[index]):
        added = (blocks[index] - previous) * len(groups[-1]) if groups else 0
        if not groups or padding + added > _MAX_PADDING_BLOCKS:
            groups.append([])
            padding = added = 0
        groups[-1].append(index)
        padding += added
        previous = blocks[index]
    if len(groups) == 1:
        groups[0].sort()
    return groups


def _masked(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf where hidden."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
