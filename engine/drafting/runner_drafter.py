"""Edge: guesses that are computed on the torch thread, at the end of the step that drew the tokens before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.drafting.draft import DraftRequest, Proposal, accepted_rows, row_of_draft
from engine.step import SampledToken, SequenceSlice


@dataclass(frozen=True, slots=True)
class GrownSequence:
    """A sequence for which a step drew `drawn`, at least one token; `request` holds the tokens before it.

    Row i of `features` [drawn, hidden] is the model's normed last hidden state from which drawn[i] came.
    """

    request: DraftRequest
    drawn: tuple[int, ...]
    features: Tensor

    @property
    def tokens(self) -> int:
        """Length of the sequence with what was drawn."""
        return len(self.request.tokens) + len(self.drawn)


class RunnerDrafter(Protocol):
    """Drafter of a runner; called from the torch thread under torch.inference_mode."""

    def propose(self, sequences: Sequence[GrownSequence]) -> list[Proposal]:
        """Guesses for some or all of the sequences, at most request.limit for each."""
        ...

    def close(self) -> None:
        """Gives its memory back, once no step will come."""
        ...


def grown_sequences(
    slices: Sequence[SequenceSlice], tokens: Sequence[SampledToken], features: Tensor
) -> list[GrownSequence]:
    """The sequences of a step that ask for a draft and drew a token.

    `features` [samples, hidden] has a row for each SampleRequest of the slices, in their order.
    """
    drawn = {(token.key, token.sample_index, token.row): token.token_id for token in tokens}
    grown: list[GrownSequence] = []
    first_row = 0
    for part in slices:
        if part.propose is not None:
            by_row = {
                row_of_draft(part.draft, request.row): drawn[at]
                for request in part.samples
                if (at := (request.key, request.sample_index, request.row)) in drawn
            }
            rows = accepted_rows(part.draft, by_row)
            if rows:
                own = features[[first_row + row for row in rows]]
                grown.append(GrownSequence(part.propose, tuple(by_row[row] for row in rows), own))
        first_row += len(part.samples)
    return grown
