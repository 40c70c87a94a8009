"""Pure: which tokens of which sequences a drafter holds KV of, in blocks of its own; forgets the oldest."""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from engine.kv.blocks import BlockPool
from tandem.errors import OutOfBlocks
from tandem.ids import BlockId


@dataclass(slots=True)
class HeldSequence:
    """`computed` tokens have KV in `table`; the last of them, `guesses`, were guessed and not known.

    `ends_at` is the length that the sequence had when its drafter last saw it.
    """

    table: list[BlockId] = field(default_factory=list)
    computed: int = 0
    guesses: list[int] = field(default_factory=list)
    ends_at: int = 0


class HeldKv:
    """The sequences of one drafter. A hint, never truth: what is lost is computed once more."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._sequences: OrderedDict[int, HeldSequence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sequences)

    def resume(self, key: int, before: int, after: int) -> HeldSequence:
        """A sequence that grew from `before` to `after` tokens; the most recent one from now on.

        Empty if it was not known, or if it was not `before` tokens long when it was last seen.
        """
        held = self._sequences.setdefault(key, HeldSequence())
        self._sequences.move_to_end(key)
        if held.ends_at != before:
            held.computed, held.guesses = 0, []
        held.ends_at = after
        return held

    def cover(self, key: int, tokens: int, keep: Collection[int]) -> bool:
        """Gives a known sequence blocks for `tokens` tokens, at the cost of old ones outside `keep`."""
        held = self._sequences[key]
        missing = self._pool.blocks_for(tokens) - len(held.table)
        while missing > 0:
            try:
                held.table += self._pool.allocate(missing)
                return True
            except OutOfBlocks:
                oldest = next((old for old in self._sequences if old not in keep and old != key), None)
                if oldest is None:
                    return False
                self.forget(oldest)
        return True

    def forget(self, key: int) -> None:
        """Frees a sequence's blocks; unknown ones are ignored."""
        held = self._sequences.pop(key, None)
        if held is not None:
            self._pool.release(held.table)
