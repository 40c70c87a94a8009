"""Edge: draws the next token of every row of logits, on torch tensors; holds no state between calls."""

from collections.abc import Sequence

import torch

from engine.sampling.logit_rules import apply_rules, changes_logits
from engine.sampling.random_numbers import uniform
from engine.sampling.token_weights import draw, filtered_weights
from engine.step import SampledToken, SampleRequest
from tandem.sampling import TokenLogprob

NOTHING = -1
"""In place of a token id: the row's logits are not finite and nothing can be drawn from them."""


class Sampler:
    """Draws tokens from a vocabulary of `vocabulary_tokens`; ids beyond it in a request are ignored."""

    plain = True
    """Whether a token depends on its row of logits and its request alone, so that a kernel may draw it."""

    def __init__(self, vocabulary_tokens: int) -> None:
        self._vocabulary = vocabulary_tokens

    def sample(self, logits: torch.Tensor, requests: Sequence[SampleRequest]) -> list[SampledToken]:
        """A token for each request, in their order; `logits` [requests, vocabulary] float, left unchanged.

        Greedy takes the lowest id among equals. Log-probabilities are of the model's own logits, before bias,
        penalties and temperature. A row without a finite maximum gives no token: its scheduler drops it, the
        others go on. A wrong shape raises ValueError.
        """
        if tuple(logits.shape) != (len(requests), self._vocabulary):
            raise ValueError(
                f"logits {tuple(logits.shape)} for {len(requests)} requests of {self._vocabulary} tokens"
            )
        if not requests:
            return []
        adjusted = _with_rules(logits, requests)
        token_ids = self.choose(adjusted, requests)
        logprobs = _logprobs(logits, token_ids, requests)
        return [
            SampledToken(request.key, request.sample_index, token_id, logprobs.get(row), request.row)
            for row, (request, token_id) in enumerate(zip(requests, token_ids, strict=True))
            if token_id != NOTHING
        ]

    def choose(self, logits: torch.Tensor, requests: Sequence[SampleRequest]) -> list[int]:
        """The token id of each row of adjusted logits [rows, vocabulary]; NOTHING where none is finite."""
        best = logits.max(dim=-1)
        chosen = best.indices
        finite = best.values.isfinite()
        drawn = [row for row, request in enumerate(requests) if not request.params.greedy]
        if drawn:
            rows = torch.tensor(drawn, device=logits.device)
            chosen[rows] = draw(
                filtered_weights(logits[rows].float(), [requests[row].params for row in drawn]),
                [self.uniform(requests[row]) for row in drawn],
            )
        token_ids: list[int] = torch.where(finite, chosen, NOTHING).tolist()
        return token_ids

    def uniform(self, request: SampleRequest) -> float:
        """The random number that a token is drawn with."""
        return uniform(request.params.seed, request.sample_index, request.output_index)


def _with_rules(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> torch.Tensor:
    """The logits in float32 with bias, bans and penalties; the model's own tensor where no row has any."""
    changed = [row for row, request in enumerate(requests) if changes_logits(request)]
    if not changed:
        return logits
    adjusted = logits.to(torch.float32, copy=True)
    for row in changed:
        apply_rules(adjusted[row], requests[row])
    return adjusted


def _logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], requests: Sequence[SampleRequest]
) -> dict[int, TokenLogprob]:
    """Log-probabilities of the rows that ask for them, by row."""
    asked = {
        row: request.params.logprobs
        for row, request in enumerate(requests)
        if request.params.logprobs is not None and token_ids[row] != NOTHING
    }
    if not asked:
        return {}
    rows = torch.tensor(list(asked), device=logits.device)
    chosen = torch.tensor([token_ids[row] for row in asked], device=logits.device).unsqueeze(1)
    logprobs = logits[rows].float().log_softmax(dim=-1)
    top = logprobs.topk(min(max(asked.values()), logits.shape[1]), dim=-1)
    own: list[float] = logprobs.gather(1, chosen).squeeze(1).tolist()
    values: list[list[float]] = top.values.tolist()
    ids: list[list[int]] = top.indices.tolist()
    return {
        row: TokenLogprob(
            token_ids[row], own[place], tuple(zip(ids[place][:count], values[place][:count], strict=True))
        )
        for place, (row, count) in enumerate(asked.items())
    }
