"""Pure: sequences that hold KV of a bounded number of tokens (MorphKV, arXiv 2503.00979).

A sequence whose KV has filled its budget gives up the old tokens that its recent ones attended to least.
Every layer and K/V head keeps others, but all keep as many, so that what is left lies in fewer blocks. A slot
is a place in the sequence's blocks: at first token i lies in slot i, later in one before it.
"""

from dataclasses import dataclass

from tandem.ids import BlockId


@dataclass(frozen=True, slots=True)
class KvBudget:
    """At most `tokens` have KV: the last `window`, and others that these attend to."""

    tokens: int
    window: int

    @property
    def kept(self) -> int:
        """Tokens that have KV after a drop: a window fewer, so that drops are a window apart."""
        return self.tokens - self.window

    def watches(self, held: int, fed: int) -> bool:
        """Whether the attention of `fed` tokens, after `held` with KV, decides at the next drop."""
        return fed == 1 and held >= self.kept

    def due(self, held: int, watched: int) -> bool:
        """Whether to drop now, when `watched` tokens were watched since the last drop."""
        return held >= self.tokens and watched >= self.window


@dataclass(frozen=True, slots=True)
class BoundedKv:
    """What a slice is told of its sequence: its `key`, and how many tokens before it were dropped.

    `watched`: its attention is taken down.
    """

    key: int
    dropped: int
    watched: bool


@dataclass(frozen=True, slots=True)
class KvDrop:
    """Of `held` slots in `source` blocks, `keep` go on in `target` blocks, which are the sequence's own.

    A target block is the source block at its place or one that no sequence had.
    """

    key: int
    held: int
    keep: int
    source: tuple[BlockId, ...]
    target: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class KvDrops:
    """What a step drops before anything else, and the `ended` sequences, whose attention is forgotten."""

    drops: tuple[KvDrop, ...] = ()
    ended: tuple[int, ...] = ()


NO_DROPS = KvDrops()
