"""Pure: guessed tokens of one sequence, and which of them hold once the model has drawn its own.

A guess holds when the model, asked after the guesses before it, draws the same token. That is all that
verification needs, whatever the drafter and however the model draws (docs/decisions/006).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem.sampling import SamplingParams

ROOT = -1
"""Parent of the first guesses: the sequence's last token."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Guesses of what follows a sequence: a tree below its last token, siblings being different.

    `parents[i]` is the index of the guess that guess i follows, or ROOT; a parent comes before its children.
    Empty `parents` mean a chain: each guess follows the one before it.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    def first(self, count: int) -> "Draft":
        """The first `count` guesses, which are a tree again."""
        return self if count >= len(self) else Draft(self.token_ids[:count], self.parents[:count])

    def parent(self, index: int) -> int:
        """The guess that guess `index` follows, or ROOT."""
        return self.parents[index] if self.parents else index - 1

    def path(self, index: int) -> tuple[int, ...]:
        """The guessed tokens from below the root to guess `index` and with it; () for ROOT."""
        tokens: list[int] = []
        while index != ROOT:
            tokens.append(self.token_ids[index])
            index = self.parent(index)
        return tuple(reversed(tokens))

    def depths(self) -> list[int]:
        """How many guesses lead to each guess, itself included: 1 for those that follow the root."""
        depths: list[int] = []
        for index in range(len(self)):
            parent = self.parent(index)
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths


NO_DRAFT = Draft()


@dataclass(frozen=True, slots=True)
class Proposal:
    """A draft for the sequence `key` at the time when it has `base_tokens` tokens; void at any other."""

    key: int
    base_tokens: int
    draft: Draft


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """Asks the runner for a draft of at most `limit` tokens, to follow what a step draws for a sequence.

    `tokens` are the sequence's prompt (the first `prompt_tokens`) and output before the step.
    """

    key: int
    sample_index: int
    tokens: Sequence[int]
    prompt_tokens: int
    params: SamplingParams
    limit: int


def accepted_rows(draft: Draft, drawn: Mapping[int, int]) -> list[int]:
    """The rows whose drawn tokens are the output, in its order; empty when row 0 drew nothing.

    Row 0 is what the model drew after the sequence's last token, row i + 1 what it drew after guess i. The
    output goes on after a row as long as one of its guesses is what the row drew.
    """
    follows = {(draft.parent(at), token_id): at for at, token_id in enumerate(draft.token_ids)}
    rows: list[int] = []
    at = ROOT
    while at + 1 in drawn:
        rows.append(at + 1)
        guess = follows.get((at, drawn[at + 1]))
        if guess is None:
            break
        at = guess
    return rows


def row_in_slice(draft: Draft, row: int) -> int:
    """Where a row stands in a slice that ends with the draft: its (negative) index into the token_ids."""
    return row - 1 - len(draft)


def row_of_draft(draft: Draft, index: int) -> int:
    """The row at the (negative) index into the token_ids of a slice that ends with the draft."""
    return index + 1 + len(draft)


def in_place(rows: Sequence[int]) -> int:
    """How many accepted guesses have their KV where the sequence wants it, given `accepted_rows`.

    Guess i is computed i slots after the sequence's last token; on another branch of a tree the accepted
    ones lie elsewhere and have to be computed once more.
    """
    count = 0
    for place, row in enumerate(rows[1:], start=1):
        if row != place:
            break
        count += 1
    return count
