"""Temperature, min-p, top-k, top-p and the draw, each against plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.token_weights import draw, filtered_weights
from tandem.sampling import SamplingParams

torch.set_num_threads(1)

# Whole and half logits, so that equal ones occur; then the order among equals matters.
LOGITS = st.lists(st.integers(-6, 6).map(lambda n: n / 2), min_size=1, max_size=12)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([0.02, 0.31, 0.57, 0.83, 0.97, 1.0]),
    top_k=st.integers(0, 14),
    min_p=st.sampled_from([0.0, 0.03, 0.23, 0.71, 1.0]),
)


def kept_tokens(logits: list[float], params: SamplingParams) -> set[int]:
    """Ids that survive the filters, by their definitions."""
    weights = [math.exp((value - max(logits)) / params.temperature) for value in logits]
    kept = [index for index, weight in enumerate(weights) if weight >= params.min_p * (1 - 1e-6)]
    kept.sort(key=lambda index: (-logits[index], index))
    if 0 < params.top_k < len(kept):
        kept = [index for index in kept if logits[index] >= logits[kept[params.top_k - 1]]]
    if params.top_p < 1:
        total, before, nucleus = sum(weights[index] for index in kept), 0.0, []
        for index in kept:
            if before >= params.top_p * total:
                break
            nucleus.append(index)
            before += weights[index]
        kept = nucleus
    return set(kept)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(LOGITS, PARAMS), min_size=1, max_size=4))
def test_filters_keep_what_their_definitions_keep(rows: list[tuple[list[float], SamplingParams]]) -> None:
    width = max(len(logits) for logits, _ in rows)
    padded = torch.tensor([[*logits, *[-math.inf] * (width - len(logits))] for logits, _ in rows])
    weights = filtered_weights(padded, [params for _, params in rows])
    for row, (logits, params) in zip(weights.tolist(), rows, strict=True):
        kept = kept_tokens(logits, params)
        assert {index for index, weight in enumerate(row) if weight > 0} == kept
        exact = [math.exp((value - max(logits)) / params.temperature) for value in logits]
        best = max(row)
        assert [row[index] / best for index in sorted(kept)] == pytest.approx(
            [exact[index] for index in sorted(kept)], rel=1e-4
        )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 0.9, 0.999]), st.integers(0, 5000), st.floats(0.1, 5)
)
def test_large_vocabulary_is_filtered_like_a_full_sort(
    seed: int, top_p: float, top_k: int, spread: float
) -> None:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(seed)) * spread
    params = SamplingParams(top_p=top_p, top_k=top_k)
    weights = filtered_weights(logits, [params])[0]
    ordered = logits[0].double().softmax(-1).sort(descending=True, stable=True)
    values = ordered.values[: top_k or None]
    before = values.cumsum(-1) - values
    count = int((before < top_p * values.sum()).sum())
    assert abs(int((weights > 0).sum()) - count) <= 1, "float32 may move the edge by one token"
    assert bool((weights[ordered.indices[: count - 1]] > 0).all())


def test_flat_distribution_needs_more_than_the_first_candidates() -> None:
    weights = filtered_weights(torch.zeros(1, 10_000), [SamplingParams(top_p=0.5)])
    assert (weights[0] > 0).nonzero().squeeze(1).tolist() == list(range(5000))


def reference_draw(weights: list[float], uniform: float) -> int:
    """First index whose cumulative weight exceeds the target."""
    target, total = uniform * math.fsum(weights), 0.0
    for index, weight in enumerate(weights):
        total += weight
        if total > target:
            return index
    return max(index for index, weight in enumerate(weights) if weight > 0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=700).filter(any),
    st.integers(0, 1023).map(lambda n: n / 1024),
)
def test_draw_is_the_inverse_of_the_cumulative_sum(weights: list[float], uniform: float) -> None:
    assert draw(torch.tensor([weights]), [uniform]).tolist() == [reference_draw(weights, uniform)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-38, 1e-7, 0.3, 1.0]), min_size=1, max_size=600).filter(any),
    st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53]),
)
def test_token_of_zero_weight_is_never_drawn(weights: list[float], uniform: float) -> None:
    (token_id,) = draw(torch.tensor([weights]), [uniform]).tolist()
    assert weights[token_id] > 0
