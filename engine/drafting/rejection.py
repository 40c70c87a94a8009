"""Edge: rejection sampling of a draft model's guesses (Chen et al. 2023, Leviathan et al. 2023).

A guess drawn from q holds with probability min(1, p / q); where it does not, the token is drawn from
max(p - q, 0). The output is distributed as p, and more guesses hold than by drawing from p and comparing;
but which token comes depends on the draft (docs/decisions/006).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.sampling.random_numbers import Purpose, uniform_for
from engine.sampling.sampler import NOTHING, Sampler
from engine.sampling.token_weights import draw, filtered_weights
from engine.step import SampleRequest


@dataclass(slots=True)
class GuessedWeights:
    """What the guesses that wait for verification were drawn from; used on the torch thread alone.

    `guesses` maps (key, sample index, output index) to the token and its weights [vocabulary] float32.
    """

    guesses: dict[tuple[int, int, int], tuple[int, Tensor]] = field(default_factory=dict)


class GuessSampler(Sampler):
    """The draft model's sampler: draws with random numbers of its own and keeps what it drew from."""

    plain = False

    def __init__(self, vocabulary_tokens: int, guessed: GuessedWeights) -> None:
        super().__init__(vocabulary_tokens)
        self._guessed = guessed

    def choose(self, logits: Tensor, requests: Sequence[SampleRequest]) -> list[int]:
        """See Sampler."""
        token_ids = super().choose(logits, requests)
        rows = _drawn_rows(requests, token_ids)
        weights = filtered_weights(logits[rows].float(), [requests[row].params for row in rows])
        for row, own in zip(rows, weights, strict=True):
            self._guessed.guesses[_position(requests[row])] = (token_ids[row], own)
        return token_ids

    def uniform(self, request: SampleRequest) -> float:
        """Independent of what decides whether the guess holds."""
        return _uniform(Purpose.GUESS, request)


class RejectionSampler(Sampler):
    """The model's sampler: takes or replaces guesses; rows without one are drawn as by Sampler."""

    plain = False

    def __init__(self, vocabulary_tokens: int, guessed: GuessedWeights) -> None:
        super().__init__(vocabulary_tokens)
        self._guessed = guessed

    def choose(self, logits: Tensor, requests: Sequence[SampleRequest]) -> list[int]:
        """See Sampler."""
        token_ids = super().choose(logits, requests)
        rows = [
            row
            for row in _drawn_rows(requests, token_ids)
            if _position(requests[row]) in self._guessed.guesses
        ]
        if rows:
            weights = filtered_weights(logits[rows].float(), [requests[row].params for row in rows])
            for row, own in zip(rows, weights, strict=True):
                token_ids[row] = self._verify(requests[row], own)
        return token_ids

    def _verify(self, request: SampleRequest, weights: Tensor) -> int:
        """The guess if it holds, else another token; `weights` [vocabulary] are the model's."""
        guess, guessed_weights = self._guessed.guesses[_position(request)]
        wanted, guessed = _normalised(weights), _normalised(guessed_weights)
        if _uniform(Purpose.ACCEPT, request) * float(guessed[guess]) < float(wanted[guess]):
            return guess
        rest = (wanted - guessed).clamp_(min=0.0).float()
        # Rounding alone can make a rejection of equal distributions; any token of p is right then.
        rest = rest if float(rest.sum()) > 0.0 else weights
        return int(draw(rest.unsqueeze(0), [_uniform(Purpose.RESIDUAL, request)]))


def _drawn_rows(requests: Sequence[SampleRequest], token_ids: Sequence[int]) -> list[int]:
    return [
        row
        for row, (request, token_id) in enumerate(zip(requests, token_ids, strict=True))
        if not request.params.greedy and token_id != NOTHING
    ]


def _normalised(weights: Tensor) -> Tensor:
    exact = weights.to(torch.float64)
    return exact / exact.sum()


def _position(request: SampleRequest) -> tuple[int, int, int]:
    return request.key, request.sample_index, request.output_index


def _uniform(purpose: Purpose, request: SampleRequest) -> float:
    return uniform_for(purpose, request.params.seed, request.sample_index, request.output_index)
