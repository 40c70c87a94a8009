"""Pure: the rules by which prompts get their turn: what a step reads, who starts next (after Sarathi-Serve).

They know of a leg only how long it is and how far it is read, so that whoever counts legs in bulk
(planner/simulation/plain_prefill.py) is held by the very rules of the live scheduler.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Unread(Protocol):
    """A leg that waits or is being read.

    KV of its first `computed` of `tokens` tokens is there. `passed_by` counts the legs that started before it
    although it was ahead of them.
    """

    computed: int
    passed_by: int

    @property
    def tokens(self) -> int:
        """Tokens to read, those that are read among them."""
        ...


UnreadT = TypeVar("UnreadT", bound=Unread)


@dataclass(frozen=True, slots=True)
class ReadingRules:
    """Limits: `token_budget` tokens a step, and no leg starts beside more than `max_parked_blocks` blocks of
    legs that are read.

    A leg that lacks blocks lets at most `max_passed_by` later ones start before it. With `whole_prompts` none
    is split (DistServe's batching): one that is longer than the budget is read alone.
    """

    token_budget: int
    max_parked_blocks: float
    max_passed_by: int = 8
    whole_prompts: bool = False

    @classmethod
    def of_pool(
        cls,
        num_blocks: int,
        token_budget: int,
        whole_prompts: bool = False,
        max_parked_fraction: float = 0.9,
        max_passed_by: int = 8,
    ) -> "ReadingRules":
        """The rules of a worker with so many blocks, of which parked legs may hold a fraction."""
        return cls(token_budget, max_parked_fraction * num_blocks, max_passed_by, whole_prompts)

    def fill_step(
        self, running: Iterable[UnreadT], start_next: Callable[[int | None], UnreadT | None]
    ) -> list[tuple[UnreadT, int]]:
        """The legs that the next step reads, and how many tokens of each: those that run first.

        `start_next` starts the next leg and gives it, if it has no more tokens than it is told (None: any).
        """
        budget = self.token_budget
        parts: list[tuple[UnreadT, int]] = []
        ahead = iter(running)
        while budget > 0:
            leg = next(ahead, None)
            if leg is None:
                leg = start_next(budget if parts and self.whole_prompts else None)
                if leg is None:
                    break
            left = leg.tokens - leg.computed
            tokens = left if self.whole_prompts else min(left, budget)
            parts.append((leg, tokens))
            budget -= tokens
        return parts

    def next_to_start(
        self,
        waiting: Sequence[UnreadT],
        parked_blocks: int,
        room: int | None,
        take_blocks: Callable[[UnreadT], bool],
    ) -> UnreadT | None:
        """The first waiting leg whose blocks can be had, unless one ahead was passed by too often.

        None, too, when its turn is a leg of more than `room` tokens. Who is passed by is noted.
        """
        if parked_blocks > self.max_parked_blocks:
            return None
        for place, leg in enumerate(waiting):
            if room is not None and leg.tokens > room:
                return None
            if take_blocks(leg):
                for ahead in waiting[:place]:
                    ahead.passed_by += 1
                return leg
            if leg.passed_by >= self.max_passed_by or place >= self.max_passed_by:
                return None
        return None
