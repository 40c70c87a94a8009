"""Edge: attention of sequences that feed few tokens each, by a native loop that reads KV blocks in place."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

import numpy as np
import torch
from torch import Tensor

from engine.attention import Span
from engine.kv.kv_cache import KvCache
from engine.models.model_config import ModelConfig
from engine.native.block_tables import BlockTables
from engine.native.kernels.attention import SEQUENCE_FIELDS, attend, attend_halves
from engine.native.team import Team

MOST_TOKENS = 16
"""Of a span; each token reads the context anew, so that matrix products are faster for longer ones."""

_ALONE_NUMBERS = 16384
"""With fewer numbers of K and V to read, handing half of them to another thread takes longer."""


@dataclass(frozen=True, slots=True)
class ShortSpans:
    """Some spans of a batch, as the kernel wants them; valid until the next plan."""

    width: int
    """More than the longest context."""
    shares: int
    """Parts that the work is cut into."""


class NativeAttention:
    """Writes and attends short spans of a pool in host memory, in float32 or bfloat16; sums are float32."""

    def __init__(self, team: Team, cache: KvCache, config: ModelConfig) -> None:
        pool = cache.pool
        self._narrow = pool.dtype == torch.bfloat16
        self._attend = team.kernel(attend_halves if self._narrow else attend, 24)
        self._shares = team.threads
        self._pool = pool.data_ptr()
        self._layer_bytes = cache.layer_bytes
        self._size, self._kv_heads, self._head_dim = pool.shape[-3:]
        self._block_stride, self._value_offset = pool.stride(0), pool.stride(2)
        self._group = config.heads // config.kv_heads
        self._windows = tuple(window or 0 for window in config.windows)
        self._scale = torch.tensor([self._head_dim**-0.5], dtype=torch.float32)
        self._scratch = torch.empty(0)
        self._tables = BlockTables(cache.num_blocks)
        self._sequences = np.zeros((0, SEQUENCE_FIELDS), dtype=np.int64)
        """[spans, 4]: first row, tokens, start, beginning of its block table among all."""
        self._bounds = np.zeros(team.threads + 1, dtype=np.int64)
        """[shares + 1]: which of spans * kv_heads each share of the work begins with."""

    def covers(self, span: Span) -> bool:
        """Whether it takes a span: a tree's guesses do not see all that is before them."""
        return span.tokens <= MOST_TOKENS and not span.tree

    def plan(self, spans: Sequence[Span]) -> ShortSpans:
        """What all layers share; one at a time is valid.

        Raises IndexError for a block table that is too short or leaves the pool.
        """
        longest = max(span.start + span.tokens for span in spans)
        self._tables.reserve(len(spans), (longest - 1) // self._size + 1)
        if len(spans) > len(self._sequences):
            self._sequences = np.zeros((2 * len(spans), SEQUENCE_FIELDS), dtype=np.int64)
        numbers: list[int] = []
        for row, span in enumerate(spans):
            blocks = (span.start + span.tokens - 1) // self._size + 1
            numbers += (
                span.first_row,
                span.tokens,
                span.start,
                self._tables.put(row, span.block_table, blocks),
            )
        self._sequences.reshape(-1)[: len(numbers)] = numbers
        reads = [span.tokens * (span.start + span.tokens) for span in spans]
        return ShortSpans(self._widen(longest + 1), self._share(reads))

    def _share(self, reads: Sequence[int]) -> int:
        """Cuts the work into shares of about equal numbers to read, one when there is little; how many.

        `reads` are the tokens whose K and V a head of each span reads.
        """
        ends = list(accumulate(reads))
        numbers = 2 * ends[-1] * self._kv_heads * self._head_dim
        shares = self._shares if numbers > _ALONE_NUMBERS else 1
        for share in range(1, shares):
            mark = ends[-1] * share / shares
            index = bisect_left(ends, mark)
            into = self._kv_heads * (mark - ends[index] + reads[index]) / reads[index]
            self._bounds[share] = index * self._kv_heads + ceil(into - 0.5)
        self._bounds[shares] = len(reads) * self._kv_heads
        return shares

    def _widen(self, width: int) -> int:
        """Makes the scratch at least so wide, in steps; returns its width."""
        width = max(256, 1 << (width - 1).bit_length())
        needed = self._shares * (self._size * self._head_dim + self._group * self._kv_heads * width)
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.float32)
        return width

    def run(
        self, spans: ShortSpans, layer: int, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> None:
        """Stores the spans' K and V and writes their rows of `out` [tokens, heads * head_dim].

        The rest as BatchAttention's; the heads of a token are contiguous in each tensor.
        """
        run = self._attend.alone if spans.shares == 1 else self._attend
        if not self._narrow:
            run(*self.arguments(spans, layer, queries, keys, values, out))
            return
        queries, keys, values = queries.float(), keys.float(), values.float()
        wide = torch.empty(out.shape, dtype=torch.float32)
        run(*self.arguments(spans, layer, queries, keys, values, wide, out))

    def arguments(
        self,
        spans: ShortSpans,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        narrow: Tensor | None = None,
    ) -> tuple[int, ...]:
        """The kernel's, for `run`'s in float32; `narrow` is to be `out` in bfloat16, dense as that is."""
        return (
            queries.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            queries.stride(0),
            keys.stride(0),
            values.stride(0),
            out.stride(0),
            self._pool + layer * self._layer_bytes,
            self._block_stride,
            self._value_offset,
            self._size,
            self._kv_heads,
            self._group,
            self._head_dim,
            self._scale.data_ptr(),
            self._sequences.ctypes.data,
            self._tables.address,
            self._windows[layer],
            self._scratch.data_ptr(),
            spans.width,
            self._bounds.ctypes.data,
            spans.shares,
            0 if narrow is None else narrow.data_ptr(),
        )

    def span_arguments(self, spans: ShortSpans) -> tuple[int, ...]:
        """Those of `arguments` that may be others in another step."""
        return (
            self._sequences.ctypes.data,
            self._tables.address,
            self._scratch.data_ptr(),
            spans.width,
            spans.shares,
        )
