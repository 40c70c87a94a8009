"""Edge: from logits to the weights that a token is drawn by: temperature, min-p, top-k, top-p; and the draw.

On torch tensors, without any state. Weights are float32 probabilities, not normalised after filtering; sums
of them are float64. A row's outcome depends on that row alone.
"""

from collections.abc import Sequence

import torch

from tandem.sampling import SamplingParams

_CHUNK = 256
_FIRST_CANDIDATES = 256
_SMALLEST_TEMPERATURE = 1e-6
_SMALLEST_TOP_P = 1e-9


def filtered_weights(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Weights [rows, vocabulary] float32 after temperature, min_p, top_k and top_p, in this order.

    `logits` [rows, vocabulary] float32, each row with a finite maximum. Filtered tokens weigh exactly 0.
    top_k keeps all tokens as probable as the k-th; top_p keeps the smallest set that reaches its share of
    what the filters before it left, lower token ids first among equals.
    """
    temperature = _column([max(p.temperature, _SMALLEST_TEMPERATURE) for p in params], logits)
    # Relative to the best token, since a large logit over a small temperature would overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    weights = scaled.softmax(dim=-1)
    if any(p.min_p > 0 for p in params):
        least = _column([p.min_p for p in params], logits) * weights.amax(dim=-1, keepdim=True)
        weights = weights.masked_fill(weights < least, 0.0)
    cut = [index for index, p in enumerate(params) if 0 < p.top_k < logits.shape[1] or p.top_p < 1.0]
    if cut:
        _cut(logits, weights, cut, params)
    return weights


def draw(weights: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """Inverse-CDF draw in token-id order: token ids [rows] int64, never one of weight 0.

    `weights` [rows, vocabulary] float32, each row with a positive sum; `uniforms` in [0, 1), one a row. The
    cumulative sum is taken over chunks first and then within one, which costs a fraction of a whole one.
    """
    rows, vocabulary = weights.shape
    chunks = -(-vocabulary // _CHUNK)
    padded = torch.nn.functional.pad(weights, (0, chunks * _CHUNK - vocabulary)).view(rows, chunks, _CHUNK)
    uniform = torch.tensor(uniforms, dtype=torch.float64, device=weights.device).unsqueeze(1)
    chunk_ends = padded.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # [rows, chunks]
    target = uniform * chunk_ends[:, -1:]
    chunk = _first_beyond(chunk_ends, target)  # [rows, 1]
    before = torch.where(chunk > 0, chunk_ends.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = padded.gather(1, chunk.unsqueeze(-1).expand(rows, 1, _CHUNK)).squeeze(1)
    token_ends = inside.cumsum(dim=-1, dtype=torch.float64)  # [rows, _CHUNK]
    return (chunk * _CHUNK + _first_beyond(token_ends, target - before)).squeeze(1)


def _first_beyond(ends: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index [rows, 1] of the first end above the target; if rounding leaves none, of the last rise."""
    last = torch.searchsorted(ends, ends[:, -1:].contiguous())
    first = torch.minimum(torch.searchsorted(ends, target, right=True), last)
    return first.clamp(max=ends.shape[1] - 1)


def _cut(
    logits: torch.Tensor, weights: torch.Tensor, rows: Sequence[int], params: Sequence[SamplingParams]
) -> None:
    """Applies top_k and top_p to some rows of `weights` in place, with ever more candidates until sure."""
    vocabulary = logits.shape[1]
    count = min(_FIRST_CANDIDATES, vocabulary)
    left = list(rows)
    while left:
        at = torch.tensor(left, device=logits.device)
        kept, ids, sure = _cut_among(logits[at], weights[at], count, [params[row] for row in left])
        done = sure.nonzero().squeeze(1)
        weights[at[done]] = torch.zeros_like(weights[at[done]]).scatter_(1, ids[done], kept[done])
        finished = sure.tolist()
        left = [row for row, is_sure in zip(left, finished, strict=True) if not is_sure]
        count = min(count * 16, vocabulary)


def _cut_among(
    logits: torch.Tensor, weights: torch.Tensor, count: int, params: Sequence[SamplingParams]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Filters the `count` best candidates of each row.

    Returns their weights [rows, count] (0 where dropped), their ids [rows, count], and for which rows [rows]
    tokens that are no candidates could not have mattered.
    """
    vocabulary = logits.shape[1]
    values, ids = _best_first(logits, count)
    kept = weights.gather(1, ids)  # [rows, count]
    limits = [p.top_k if 0 < p.top_k < vocabulary else 0 for p in params]
    kth = _column([min(limit or vocabulary, count) - 1 for limit in limits], ids)
    kth_value = values.gather(1, kth)
    kept = kept.masked_fill(values < kth_value, 0.0)
    has_k = _column([limit > 0 for limit in limits], kept).bool()
    total = torch.where(
        has_k,
        kept.sum(dim=-1, keepdim=True, dtype=torch.float64),
        weights.sum(dim=-1, keepdim=True, dtype=torch.float64),
    )
    share = _column([max(p.top_p, _SMALLEST_TOP_P) if p.top_p < 1.0 else 2.0 for p in params], total)
    before = kept.cumsum(dim=-1, dtype=torch.float64) - kept
    kept = kept.masked_fill(before >= share * total, 0.0)
    lowest = values.gather(1, ((kept > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0))
    # The share of top_p is of all that top_k keeps: those must be candidates, not only the ones kept at last.
    decisive = torch.where(has_k, kth_value, lowest).squeeze(1)
    return kept, ids, (decisive > values[:, -1]) | (count == vocabulary)


def _best_first(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` highest logits of each row and their ids, best first, lower ids first among equals."""
    _, ids = logits.topk(count, dim=-1, sorted=False)
    ids = ids.sort(dim=-1).values
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _column(numbers: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).unsqueeze(1)
