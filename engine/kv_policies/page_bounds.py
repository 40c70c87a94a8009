"""Edge: the least and greatest keys of every block, beside the pool: what Quest chooses pages by."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.kv_policies.paged_rows import PagedRows, Places
from engine.native.kernels.pages import POOL_FIELDS, read_bounds
from engine.native.team import Team
from tandem.ids import BlockId

FULL_LAYERS = 2
"""The first layers see all pages: their attention is not sparse (Quest, section 3.1). They have no bounds."""


class PageBounds:
    """Bounds that hold for every key in a block; they may be loose, never wrong.

    Keys that are written again later (guesses that did not hold) loosen them until the block starts anew.
    """

    def __init__(self, rows: PagedRows, num_blocks: int, team: Team) -> None:
        layers, _, kv_heads, _, head_dim = rows.shape
        self._rows = rows
        self._read = team.kernel(read_bounds, POOL_FIELDS + 6)
        self.bounds: Tensor = torch.zeros((num_blocks, layers, kv_heads, 2, head_dim), dtype=torch.float32)
        """[num_blocks, layers, kv_heads, 2 (least, greatest), head_dim]; PagedRows.write extends it."""

    def of_layer(self, layer: int) -> Tensor | None:
        """The bounds of all layers, or None in a layer that sees all pages."""
        return self.bounds if layer >= FULL_LAYERS else None

    def begin_step(
        self, landed: Sequence[tuple[BlockId, int]], copies: Sequence[tuple[BlockId, BlockId]]
    ) -> None:
        """Reads the keys of blocks that others wrote (block, tokens), then the (source, target) copies."""
        if landed:
            blocks = np.repeat([block for block, _ in landed], [tokens for _, tokens in landed])
            offsets = np.concatenate([np.arange(tokens) for _, tokens in landed])
            places = Places(blocks.astype(np.int64), offsets.astype(np.int64))
            self._read(
                *self._rows.pool_arguments,
                FULL_LAYERS,
                *places.arguments,
                self.bounds.data_ptr(),
                self.bounds.shape[0],
            )
        for source, target in copies:
            self.bounds[target] = self.bounds[source]
