"""Pure: samples that take one token each a step, kept as sums and a clock, so that many steps cost one.

A sample's own fields are brought up to date by `settle`; until then they are as of when it joined.
"""

import heapq

from decode_worker.decode_leg import SampleRecord
from decode_worker.grown_tokens import GrownTokens
from engine.blocks import BlockPool


class SteadyBatch:
    """The sums, and the blocks promised to samples that have not named them."""

    def __init__(self, pool: BlockPool, context_limit: int) -> None:
        self._pool = pool
        self._context_limit = context_limit
        self._members: dict[int, tuple[int, int, GrownTokens]] = {}
        self._ends: list[tuple[int, tuple[int, int, int], int, SampleRecord]] = []
        # How many members need a new block when the clock, modulo the block size, is at the index.
        self._needing = [0] * pool.block_size
        self.clock = 0
        """Steps taken."""
        self.context_tokens = 0
        """Tokens whose KV the next step reads."""

    def __len__(self) -> int:
        return len(self._members)

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
        end = self.clock + max(1, left)
        self._members[sample.key] = (self.clock, end, tokens)
        heapq.heappush(self._ends, (end, sample.rank, sample.key, sample))
        self._needing[(self.clock - computed) % size] += 1
        self.context_tokens += len(tokens)
        return True

    def leave(self, sample: SampleRecord) -> None:
        """Brings a member up to date and lets it go; nothing happens to a sample that is none."""
        if sample.key not in self._members:
            return
        self._settle(sample)
        del self._members[sample.key]
        self._needing[(self.clock - sample.computed) % self._pool.block_size] -= 1
        self.context_tokens -= len(sample.tokens)

    def length(self, sample: SampleRecord) -> int:
        """Tokens of a sample now, a member or not."""
        member = self._members.get(sample.key)
        return len(sample.tokens) + (0 if member is None else self.clock - member[0])

    def steps_to_end(self) -> int:
        """Steps up to the one that ends a member; there must be one."""
        self._forget_stale_ends()
        return self._ends[0][0] - self.clock

    def ending(self) -> list[SampleRecord]:
        """The members that end with the step that was taken last."""
        found: list[SampleRecord] = []
        self._forget_stale_ends()
        while self._ends and self._ends[0][0] == self.clock:
            found.append(heapq.heappop(self._ends)[3])
            self._forget_stale_ends()
        return found

    def _forget_stale_ends(self) -> None:
        """Drops the ends of samples that left, or left and came back."""
        ends, members = self._ends, self._members
        while ends and ((member := members.get(ends[0][2])) is None or member[1] != ends[0][0]):
            heapq.heappop(ends)

    def growth_next(self) -> int:
        """Blocks that the next step needs."""
        return self._needing[self.clock % len(self._needing)]

    def growth(self, steps: int) -> int:
        """Blocks that the next steps need."""
        size = len(self._needing)
        rounds, rest = divmod(steps, size)
        start = self.clock % size
        needing = self._needing
        return rounds * len(self._members) + sum([needing[(start + step) % size] for step in range(rest)])

    def steps_with_blocks(self, most: int) -> int:
        """How many of the next `most` steps the free blocks suffice for."""
        free, members = self._pool.free_blocks, len(self._members)
        if (most // len(self._needing) + 1) * members <= free or self.growth(most) <= free:
            return most
        steps = free // members * len(self._needing)
        free -= self.growth(steps)
        while steps < most:
            free -= self._needing[(self.clock + steps) % len(self._needing)]
            if free < 0:
                break
            steps += 1
        return steps

    def take(self, steps: int) -> None:
        """The steps are over; their blocks were promised."""
        self.clock += steps
        self.context_tokens += steps * len(self._members)

    def _settle(self, sample: SampleRecord) -> None:
        seen, end, tokens = self._members[sample.key]
        steps = self.clock - seen
        tokens.grow(steps)
        sample.computed += steps
        sample.table += self._pool.redeem(self._pool.blocks_for(sample.computed) - len(sample.table))
        self._members[sample.key] = (self.clock, end, tokens)
