"""Edge: the least and greatest keys of every block, beside the pool: what Quest chooses pages by."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.kv_policies import kernels
from engine.kv_policies.paged_rows import PagedRows, Places
from tandem.ids import BlockId

FULL_LAYERS = 2
"""The first layers see all pages: their attention is not sparse (Quest, section 3.1). They have no bounds."""


class PageBounds:
    """Bounds that hold for every key in a block; they may be loose, never wrong.

    Keys that are written again later (guesses that did not hold) loosen them until the block starts anew.
    """

    def __init__(self, rows: PagedRows, num_blocks: int) -> None:
        layers, _, kv_heads, _, head_dim = rows.shape
        self._rows = rows
        self._layers = layers
        self.bounds: NDArray[np.float32] = np.zeros((num_blocks, layers, kv_heads, 2, head_dim), np.float32)
        """[num_blocks, layers, kv_heads, 2 (least, greatest), head_dim]"""

    def extend(self, layer: int, places: Places) -> None:
        """Takes in the keys of one layer that were just written, in the order of their offsets."""
        if layer >= FULL_LAYERS:
            kernels.extend_bounds(*self._rows.pool_view, layer, layer + 1, *places, self.bounds)

    def begin_step(
        self, landed: Sequence[tuple[BlockId, int]], copies: Sequence[tuple[BlockId, BlockId]]
    ) -> None:
        """Reads the keys of blocks that others wrote (block, tokens), then the (source, target) copies."""
        if landed:
            blocks = np.repeat([block for block, _ in landed], [tokens for _, tokens in landed])
            offsets = np.concatenate([np.arange(tokens) for _, tokens in landed])
            places = blocks.astype(np.int64), offsets.astype(np.int64)
            kernels.extend_bounds(*self._rows.pool_view, FULL_LAYERS, self._layers, *places, self.bounds)
        for source, target in copies:
            self.bounds[target] = self.bounds[source]
