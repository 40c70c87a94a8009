"""Edge: attention of sequences that feed few tokens each, by a native loop that reads KV blocks in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention import Span
from engine.kv_cache import KvCache
from engine.model_config import ModelConfig
from engine.native.kernels.attention import attend
from engine.native.team import Team

MOST_TOKENS = 16
"""Of a span; each token reads the context anew, so that matrix products are faster for longer ones."""

_ALONE_NUMBERS = 16384
"""With fewer numbers of K and V to read, handing half of them to another thread takes longer."""


@dataclass(frozen=True, slots=True)
class ShortSpans:
    """Some spans of a batch, as the kernel wants them; the arrays keep the addresses valid."""

    sequences: npt.NDArray[np.int64]
    """[spans, 4]: first row, tokens, start, beginning of its block table in `tables`."""
    tables: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]
    """[shares + 1]: which of spans * kv_heads each share of the work begins with."""
    width: int
    """More than the longest context."""
    addresses: tuple[int, int, int]
    """Of the three arrays."""

    @property
    def shares(self) -> int:
        """Parts that the work is cut into."""
        return len(self.bounds) - 1


class NativeAttention:
    """Writes and attends short spans of a float32 pool in host memory."""

    def __init__(self, team: Team, cache: KvCache, config: ModelConfig) -> None:
        self._attend = team.kernel(attend, 23)
        self._shares = team.threads
        pool = cache.pool
        self._pool = pool.data_ptr()
        self._layer_bytes, self._num_blocks = cache.layer_bytes, cache.num_blocks
        self._size, self._kv_heads, self._head_dim = pool.shape[-3:]
        self._block_stride, self._value_offset = pool.stride(0), pool.stride(2)
        self._group = config.heads // config.kv_heads
        self._windows = tuple(window or 0 for window in config.windows)
        self._scale = torch.tensor([self._head_dim**-0.5], dtype=torch.float32)
        self._scratch = torch.empty(0)

    def covers(self, span: Span) -> bool:
        """Whether it takes a span: a tree's guesses do not see all that is before them."""
        return span.tokens <= MOST_TOKENS and not span.tree

    def plan(self, spans: Sequence[Span]) -> ShortSpans:
        """What all layers share. Raises IndexError for a block table that is too short or leaves the pool."""
        used = [(span.start + span.tokens - 1) // self._size + 1 for span in spans]
        if any(blocks > len(span.block_table) for blocks, span in zip(used, spans, strict=True)):
            raise IndexError("A block table is shorter than its sequence.")
        tables = np.fromiter(
            chain.from_iterable(span.block_table[:blocks] for blocks, span in zip(used, spans, strict=True)),
            dtype=np.int64,
            count=sum(used),
        )
        if tables.min() < 0 or tables.max() >= self._num_blocks:
            raise IndexError(f"A block table leaves the pool of {self._num_blocks} blocks.")
        sequences = np.array([(span.first_row, span.tokens, span.start, 0) for span in spans], dtype=np.int64)
        sequences[1:, 3] = np.cumsum(used)[:-1]
        bounds = self._bounds(sequences)
        width = self._widen(int((sequences[:, 1] + sequences[:, 2]).max()) + 1)
        addresses = (sequences.ctypes.data, tables.ctypes.data, bounds.ctypes.data)
        return ShortSpans(sequences, tables, bounds, width, addresses)

    def _bounds(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Shares of about equal numbers to read: one share when there is little."""
        reads = np.repeat(sequences[:, 1] * (sequences[:, 1] + sequences[:, 2]), self._kv_heads)
        done = np.cumsum(reads)
        shares = self._shares if 2 * int(done[-1]) * self._head_dim > _ALONE_NUMBERS else 1
        marks = done[-1] * np.arange(1, shares, dtype=np.float64) / shares
        inner = np.searchsorted(done - reads / 2, marks)
        return np.concatenate(([0], inner, [len(reads)])).astype(np.int64)

    def _widen(self, width: int) -> int:
        """Makes the scratch at least so wide, in steps; returns its width."""
        width = max(256, 1 << (width - 1).bit_length())
        needed = self._shares * self._group * self._kv_heads * width
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
        run(*self.arguments(spans, layer, queries, keys, values, out))

    def arguments(
        self, spans: ShortSpans, layer: int, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> tuple[int, ...]:
        """The kernel's, for `run`'s."""
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
            spans.addresses[0],
            spans.addresses[1],
            self._windows[layer],
            self._scratch.data_ptr(),
            spans.width,
            spans.addresses[2],
            spans.shares,
        )

    def span_arguments(self, spans: ShortSpans) -> dict[int, int]:
        """Those of `arguments`, by place, that change from step to step."""
        return {
            16: spans.addresses[0],
            17: spans.addresses[1],
            19: self._scratch.data_ptr(),
            20: spans.width,
            21: spans.addresses[2],
            22: spans.shares,
        }
