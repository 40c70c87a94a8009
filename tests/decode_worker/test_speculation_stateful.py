"""The decode scheduler under random use while it verifies guesses, right and wrong, in chains and trees.

All that holds without guesses (test_scheduler_stateful) holds with them: the same tokens, the same accounts.
"""

from collections.abc import Iterable, Sequence

from hypothesis import settings
from hypothesis.stateful import invariant, rule

from decode_worker.scheduler import LegState
from decode_worker.speculation import Speculation
from engine.drafting.draft import Draft, Proposal
from tests.decode_worker.test_scheduler_stateful import BATCH, BLOCKS, SIZE, VOCABULARY, DecodeMachine
from tests.engine.drafting.always import Always

TREE = Draft((0, 1, 2, 3, 4, 0, 1, 2), (-1, -1, -1, -1, -1, 0, 3, 4))
"""Every token below the root, so that one holds always; its KV is rarely in place."""


class AnyGuess:
    """A drafter whose guesses depend on nothing but the sequence's length and its last token."""

    asks_runner = False

    def __init__(self) -> None:
        self.known: set[int] = set()

    def propose(self, key: int, tokens: Sequence[int], limit: int) -> Draft:
        """See Drafter."""
        self.known.add(key)
        kind = (len(tokens) + tokens[-1]) % 3
        if kind == 0:
            return Draft()
        if kind == 1:
            return TREE.first(limit)
        return Draft(tuple((tokens[-1] + place) % VOCABULARY for place in range(limit)))

    def learn(self, proposals: Iterable[Proposal]) -> None:
        """See Drafter."""
        assert not list(proposals)

    def forget(self, key: int) -> None:
        """See Drafter."""
        self.known.discard(key)


class SpeculatingMachine(DecodeMachine):
    """Guesses take blocks only while their step is in flight."""

    def speculation(self) -> Speculation:
        self.drafter = AnyGuess()
        return Speculation(self.drafter, Always(), max_tokens=8)

    @rule()
    def some_steps(self) -> None:
        """So that runs get as far as accepting several guesses in one step."""
        for _ in range(3):
            if self.plan is None:
                self.begin_step()
            if self.plan is not None:
                self.end_step()

    @invariant()
    def samples_hold_the_blocks_of_their_own_tokens(self) -> None:
        if self.plan is not None:
            return
        states = self.legs.legs()
        running = [client for (leg, _), client in self.readers.items() if states.get(leg) is LegState.RUNNING]
        own = sum(-(-(len(client.prompt) + len(client.output)) // SIZE) for client in running)
        pulled = sum(len(r.target_blocks) + r.first_block for r, _ in self.pulls.values())
        early = [leg_id for leg_id, state in states.items() if state is LegState.LANDED]
        landed = sum(-(-len(self.legs.leg(leg_id).token_ids) // SIZE) for leg_id in early)
        assert sum(map(len, self.legs.held_blocks())) <= own + pulled + landed

    @invariant()
    def nothing_is_kept_of_sequences_that_ended(self) -> None:
        assert len(self.drafter.known) <= BATCH <= BLOCKS

    def teardown(self) -> None:
        super().teardown()
        assert not self.drafter.known


TestSpeculatingScheduler = SpeculatingMachine.TestCase
TestSpeculatingScheduler.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, derandomize=True
)
