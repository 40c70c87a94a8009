"""Pure: samples that take one token each a step, kept as sums and a clock, so that many steps cost one.

A sample's own fields are brought up to date by `settle`; until then they are as of when it joined.
"""

import heapq
from dataclasses import dataclass

from decode_worker.decode_leg import SampleRecord
from decode_worker.grown_tokens import GrownTokens
from engine.kv.blocks import BlockPool
from engine.kv.length_sums import LengthSums


@dataclass(slots=True)
class _Member:
    """`join` tells this stay from others of the sample; `tokens` are as of the clock at `seen`."""

    join: int
    tokens: GrownTokens
    seen: int


class SteadyBatch:
    """The members, and the blocks promised to them that they have not named."""

    def __init__(self, pool: BlockPool, context_limit: int) -> None:
        self._pool = pool
        self._context_limit = context_limit
        self._members: dict[int, _Member] = {}
        self._ends: list[tuple[int, tuple[int, int, int], int, SampleRecord]] = []
        self._joins = 0
        self.sums = LengthSums(pool.block_size)

    def join(self, sample: SampleRecord) -> bool:
        """Takes a sample in whose fields are up to date.

        False when its next step is no plain one: several tokens to feed, or a block to copy before a write.
        """
        tokens, computed, size = sample.tokens, sample.computed, self._pool.block_size
        if not isinstance(tokens, GrownTokens) or len(tokens) != computed + 1:
            return False
        if computed % size and not self._pool.private(sample.table[computed // size]):
            return False
        left = self._context_limit - len(tokens)
        limit = sample.record.leg.params.max_tokens
        if limit is not None:
            left = min(left, limit - sample.output_index)
        end = self.sums.clock + max(1, left)
        self._joins += 1
        self._members[sample.key] = _Member(self._joins, tokens, self.sums.clock)
        heapq.heappush(self._ends, (end, sample.rank, self._joins, sample))
        self.sums.join(computed)
        return True

    def leave(self, sample: SampleRecord) -> None:
        """Brings a member up to date and lets it go; nothing happens to a sample that is none."""
        if sample.key not in self._members:
            return
        self._settle(sample)
        del self._members[sample.key]
        self.sums.leave(sample.computed)

    def length(self, sample: SampleRecord) -> int:
        """Tokens of a sample now, a member or not."""
        member = self._members.get(sample.key)
        return len(sample.tokens) + (0 if member is None else self.sums.clock - member.seen)

    def steps_to_end(self) -> int:
        """Steps up to the one that ends a member; there must be one."""
        self._forget_stale_ends()
        return self._ends[0][0] - self.sums.clock

    def ending(self) -> list[SampleRecord]:
        """The members that end with the step that was taken last."""
        found: list[SampleRecord] = []
        self._forget_stale_ends()
        while self._ends and self._ends[0][0] == self.sums.clock:
            found.append(heapq.heappop(self._ends)[3])
            self._forget_stale_ends()
        return found

    def _forget_stale_ends(self) -> None:
        """Drops the ends of samples that left, or left and came back."""
        ends, members = self._ends, self._members
        while ends and ((member := members.get(ends[0][3].key)) is None or member.join != ends[0][2]):
            heapq.heappop(ends)

    def _settle(self, sample: SampleRecord) -> None:
        member = self._members[sample.key]
        steps = self.sums.clock - member.seen
        member.tokens.grow(steps)
        sample.computed += steps
        sample.table += self._pool.redeem(self._pool.blocks_for(sample.computed) - len(sample.table))
        member.seen = self.sums.clock
