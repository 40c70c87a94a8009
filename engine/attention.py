"""Edge: what the decoder asks of an attention back-end: write K and V into the paged cache, and attend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tandem.ids import BlockId


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence in a flat batch.

    They are rows first_row .. first_row+tokens-1 of the batch, at positions start .. start+tokens-1 of their
    sequence, whose KV lies in `block_table`.
    """

    first_row: int
    tokens: int
    start: int
    block_table: Sequence[BlockId]


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
