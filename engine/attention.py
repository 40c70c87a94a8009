"""Edge: what the decoder asks of an attention back-end: write K and V into the paged cache, and attend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.drafting.draft import NO_DRAFT, ROOT, Draft
from engine.kv_policies.bounded_kv import BoundedKv
from tandem.ids import BlockId


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence in a flat batch.

    They are rows first_row .. first_row+tokens-1 of the batch, at positions start .. start+tokens-1 of their
    sequence, whose KV lies in `block_table`. The last ones may be the guesses of a `tree` with several
    branches: a guess sees its own branch only, and stands as far into the sequence as it is deep.
    Where KV was dropped (`bounded`), `start` is a slot, and positions are so many tokens further.
    """

    first_row: int
    tokens: int
    start: int
    block_table: Sequence[BlockId]
    tree: Draft = NO_DRAFT
    bounded: BoundedKv | None = None

    @property
    def dropped(self) -> int:
        """Tokens before it whose KV was dropped."""
        return 0 if self.bounded is None else self.bounded.dropped

    def rows(self) -> range:
        """Its rows of the batch."""
        return range(self.first_row, self.first_row + self.tokens)

    def positions(self) -> list[int]:
        """Where each token stands in its sequence; slots of K and V are counted from `start` instead."""
        first = self.start + self.dropped
        if not self.tree:
            return list(range(first, first + self.tokens))
        known = self.tokens - len(self.tree)
        last = first + known - 1
        return [*range(first, last + 1), *(last + depth for depth in self.tree.depths())]


class BatchAttention(Protocol):
    """Attention of one batch, for each layer in turn."""

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores K and V, then attends causally over each span's sequence, within the layer's window if any.

        queries [tokens, heads, head_dim]; keys and values [tokens, kv_heads, head_dim], rotated already.
        Returns [tokens, heads * head_dim]. The result may be overwritten by the next call.
        """
        ...


class AttentionBackend(Protocol):
    """One way to attend over a paged cache; used from one thread."""

    def prepare(self, spans: Sequence[Span]) -> BatchAttention:
        """Builds what all layers of one forward share. Raises IndexError when a block table is too short.

        The result is valid until the next call of `prepare`.
        """
        ...


def hidden_keys(span: Span, first: int, window: int | None) -> Tensor:
    """Which keys each token of a span does not attend to, of those in slots `first` and beyond.

    bool [tokens, start + tokens - first]: later ones, those outside the window and other branches' guesses.
    """
    key_at = torch.arange(first, span.start + span.tokens)
    query_at = torch.tensor(span.positions()) - span.dropped
    if span.tree:
        key_at[-span.tokens :] = query_at
    hidden = key_at > query_at[:, None]
    if window is not None:
        hidden |= key_at <= query_at[:, None] - window
    if span.tree:
        hidden[-len(span.tree) :, -len(span.tree) :] |= _off_branch(span.tree)
    return hidden


def _off_branch(tree: Draft) -> Tensor:
    """Which guesses (columns) a guess (row) does not see: bool [guesses, guesses]."""
    hidden = torch.ones(len(tree), len(tree), dtype=torch.bool)
    for index in range(len(tree)):
        parent = tree.parent(index)
        if parent != ROOT:
            hidden[index] = hidden[parent]
        hidden[index, index] = False
    return hidden
