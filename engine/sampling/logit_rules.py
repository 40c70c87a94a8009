"""Edge: what a request does to its logits before temperature: bias, banned tokens, penalties.

On torch tensors, without any state. The order is vLLM's: bias, ban, repetition, frequency, presence.
"""

from collections.abc import Sequence

import torch

from engine.step import SampleRequest


def changes_logits(request: SampleRequest) -> bool:
    """Whether the request's logits differ from the model's."""
    params = request.params
    return bool(params.logit_bias) or bool(request.banned) or params.needs_history


def apply_rules(row: torch.Tensor, request: SampleRequest) -> None:
    """Changes one row of logits in place; token ids outside the vocabulary are ignored.

    `row` [vocabulary] float32.
    """
    vocabulary = row.shape[0]
    bias = {token: value for token, value in request.params.logit_bias.items() if 0 <= token < vocabulary}
    if bias:
        row[_index(list(bias), row)] += torch.tensor(list(bias.values()), dtype=row.dtype, device=row.device)
    banned = {token for token in request.banned if 0 <= token < vocabulary}
    # A ban of everything would leave nothing to draw; a token has to come, so it is void.
    if banned and len(banned) < vocabulary:
        row[_index(sorted(banned), row)] = -torch.inf
    if request.params.needs_history:
        _penalise(row, request)
        # A tiny repetition penalty overflows; the row stays finite so that its neighbours are not concerned.
        row.clamp_(max=torch.finfo(row.dtype).max)


def _penalise(row: torch.Tensor, request: SampleRequest) -> None:
    params = request.params
    if params.repetition_penalty != 1.0:
        seen = _counts(request.history, row) > 0
        penalised = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
        row.copy_(torch.where(seen, penalised, row))
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        written = _counts(request.history[request.prompt_tokens :], row)
        row -= params.frequency_penalty * written + params.presence_penalty * (written > 0)


def _counts(token_ids: Sequence[int], row: torch.Tensor) -> torch.Tensor:
    """How often each token of the vocabulary occurs: [vocabulary] int64."""
    ids = _index(token_ids, row)
    return torch.bincount(ids[(ids >= 0) & (ids < row.shape[0])], minlength=row.shape[0])


def _index(token_ids: Sequence[int], row: torch.Tensor) -> torch.Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=row.device)
