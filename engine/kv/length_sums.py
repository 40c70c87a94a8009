"""Pure: sequences that grow by one token a step, as sums: how many blocks, how much context, how far yet."""


class LengthSums:
    """Sums over sequences and a clock of steps; every operation costs at most O(block size).

    A sequence is `computed` tokens long at a step when so many have their KV; the step feeds one more.
    """

    __slots__ = ("_needing", "_size", "clock", "context_tokens", "count")

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        # How many sequences need a new block when the clock, modulo the block size, is at the index.
        self._needing = [0] * block_size
        self.clock = 0
        """Steps taken."""
        self.count = 0
        """Sequences."""
        self.context_tokens = 0
        """Tokens whose KV the next step reads, the ones that it feeds among them."""

    def join(self, computed: int) -> None:
        """A sequence of that length grows from the next step on."""
        self.count += 1
        self._needing[(self.clock - computed) % self._size] += 1
        self.context_tokens += computed + 1

    def leave(self, computed: int) -> None:
        """A sequence that is so long now grows no more."""
        self.count -= 1
        self._needing[(self.clock - computed) % self._size] -= 1
        self.context_tokens -= computed + 1

    def take(self, steps: int) -> None:
        """So many steps are over."""
        self.clock += steps
        self.context_tokens += steps * self.count

    def growth_next(self) -> int:
        """Blocks that the next step needs."""
        return self._needing[self.clock % self._size]

    def growth(self, steps: int) -> int:
        """Blocks that the next steps need."""
        rounds, rest = divmod(steps, self._size)
        start = self.clock % self._size
        end = start + rest
        needing = self._needing
        some = sum(needing[start:end]) + sum(needing[: max(0, end - self._size)])
        return rounds * self.count + some

    def steps_with_blocks(self, free: int, most: int) -> int:
        """How many of the next `most` steps so many free blocks suffice for."""
        if (most // self._size + 1) * self.count <= free or self.growth(most) <= free:
            return most
        steps = free // self.count * self._size
        while steps < most and self.growth(steps + 1) <= free:
            steps += 1
        return steps
