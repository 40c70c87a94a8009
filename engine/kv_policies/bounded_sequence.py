"""Pure: the slots and blocks of one sequence that holds KV of a bounded number of tokens."""

from dataclasses import dataclass

from engine.kv.blocks import BlockPool
from engine.kv_policies.bounded_kv import BoundedKv, KvBudget, KvDrop
from tandem.ids import BlockId


@dataclass(slots=True)
class BoundedSequence:
    """What whoever owns a sequence's block table knows beside it; `key` names the sequence to the runner."""

    key: int
    dropped: int = 0
    """Tokens whose KV was dropped: of `computed` tokens, computed - dropped have a slot."""
    watched: int = 0
    """Tokens whose attention was taken down since the last drop."""

    def drop(
        self, pool: BlockPool, budget: KvBudget, table: list[BlockId], computed: int, fed: int
    ) -> tuple[KvDrop, list[BlockId]] | None:
        """What to drop before the step that feeds `fed` tokens after `computed`; None when it is not time.

        Makes `table` that of what stays, with room for the step. The blocks that come back with the drop are
        still read by it, and are to be released after the step. After OutOfBlocks less may be cached.
        """
        held = computed - self.dropped
        if not budget.due(held, self.watched):
            return None
        source, kept = tuple(table), pool.blocks_for(budget.kept)
        target = list(source[: pool.blocks_for(budget.kept + fed)])
        others = [index for index, block in enumerate(target) if not pool.private(block)]
        if len(others) > pool.free_blocks:
            # A cached prompt must not keep the only sample that could free its blocks from doing so.
            others = [index for index in others if not pool.withdraw(target[index])]
        for index, block in zip(others, pool.allocate(len(others)), strict=True):
            target[index] = block
        table[:] = target
        self.dropped += held - budget.kept
        self.watched = 0
        leaving = [block for index, block in enumerate(source) if block not in target[index : index + 1]]
        return KvDrop(self.key, held, budget.kept, source, tuple(target[:kept])), leaving

    def note(self, budget: KvBudget, computed: int, fed: int) -> BoundedKv | None:
        """What that step's slice says of the sequence; None while it has all its KV and is not watched."""
        watched = budget.watches(computed - self.dropped, fed)
        return BoundedKv(self.key, self.dropped, watched) if watched or self.dropped else None

    def fed(self, budget: KvBudget, computed: int, fed: int) -> None:
        """That step is done; `computed` is from before it."""
        self.watched += budget.watches(computed - self.dropped, fed)
