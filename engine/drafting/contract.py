"""Pure: what a scheduler asks of a drafter."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from engine.drafting.draft import Draft, Proposal


class Drafter(Protocol):
    """Guesses what follows sequences; used by one scheduler, on its thread, and never blocks."""

    @property
    def asks_runner(self) -> bool:
        """Whether the guesses are made by the runner: then plans must carry DraftRequests."""
        ...

    def propose(self, key: int, tokens: Sequence[int], limit: int) -> Draft:
        """At most `limit` guesses of what follows `tokens`, the whole sequence of `key`; may be none.

        Calls for one key see a sequence that only grows.
        """
        ...

    def learn(self, proposals: Iterable[Proposal]) -> None:
        """Takes what the runner guessed at the end of a step."""
        ...

    def forget(self, key: int) -> None:
        """The sequence ended; an unknown key is ignored."""
        ...


class RunnerDrafts:
    """Drafter of what the runner guesses (draft model, Medusa, EAGLE); holds one draft a sequence."""

    asks_runner = True

    def __init__(self) -> None:
        self._held: dict[int, Proposal] = {}

    def propose(self, key: int, tokens: Sequence[int], limit: int) -> Draft:
        """The held draft, if the sequence is still what it was made for."""
        held = self._held.get(key)
        if held is None or held.base_tokens != len(tokens):
            return Draft()
        return held.draft.first(limit)

    def learn(self, proposals: Iterable[Proposal]) -> None:
        """Replaces the held drafts of the sequences named."""
        for proposal in proposals:
            self._held[proposal.key] = proposal

    def forget(self, key: int) -> None:
        """See Drafter."""
        self._held.pop(key, None)
