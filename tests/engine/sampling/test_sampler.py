"""The sampler as a whole: distribution, independence of the batch, rules before the draw, logprobs."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.sampler import Sampler
from engine.step import SampleRequest
from tandem.sampling import SamplingParams

torch.set_num_threads(1)

GREEDY = SamplingParams(temperature=0.0)


def request(params: SamplingParams, output_index: int = 0, **more: Any) -> SampleRequest:
    """A request of key 0 and sample 0."""
    return SampleRequest(0, 0, output_index, params, **more)


def sample_one(logits: list[float], params: SamplingParams, **more: Any) -> int:
    """The token drawn from one row."""
    sampler = Sampler(len(logits))
    return sampler.sample(torch.tensor([logits]), [request(params, **more)])[0].token_id


def frequencies(logits: list[float], params: SamplingParams, draws: int) -> list[int]:
    """How often each token is drawn at output indices 0, 1, ..."""
    rows = torch.tensor([logits]).expand(draws, -1)
    tokens = Sampler(len(logits)).sample(rows, [request(params, index) for index in range(draws)])
    counts = [0] * len(logits)
    for token in tokens:
        counts[token.token_id] += 1
    return counts


@pytest.mark.parametrize(
    ("params", "weights"),
    [
        (SamplingParams(), [0.4, 0.3, 0.2, 0.1]),
        (SamplingParams(temperature=0.5), [0.16, 0.09, 0.04, 0.01]),
        (SamplingParams(top_k=2), [0.4, 0.3, 0, 0]),
        (SamplingParams(top_p=0.75), [0.4, 0.3, 0.2, 0]),
        (SamplingParams(min_p=0.4), [0.4, 0.3, 0.2, 0]),
        (SamplingParams(top_k=3, top_p=0.7), [0.4, 0.3, 0, 0]),
        (SamplingParams(temperature=2.0, min_p=0.8), [math.sqrt(0.4), math.sqrt(0.3), 0, 0]),
        (SamplingParams(logit_bias={0: -100.0, 3: math.log(2)}), [0, 0.3, 0.2, 0.2]),
    ],
)
def test_draws_follow_the_exact_filtered_distribution(params: SamplingParams, weights: list[float]) -> None:
    draws = 4000
    counts = frequencies([math.log(p) for p in (0.4, 0.3, 0.2, 0.1)], params, draws)
    expected = [draws * weight / sum(weights) for weight in weights]
    assert all(seen == 0 for seen, wanted in zip(counts, expected, strict=True) if wanted == 0)
    chi_square = sum((s - e) ** 2 / e for s, e in zip(counts, expected, strict=True) if e > 0)
    assert chi_square < 16.3, "p < 0.001 with three degrees of freedom"


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert sample_one([0.0, 2.0, 2.0, 1.0], GREEDY) == 1
    assert sample_one([1.0] * 1000, GREEDY) == 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e-6, 1e-3])
def test_tiny_temperature_takes_the_best_token(temperature: float) -> None:
    assert sample_one([3.0, -40.0, 3.5, 0.0], SamplingParams(temperature=temperature)) == 2


def test_draw_is_the_same_whatever_else_is_in_the_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 3000, generator=generator) * 3
    choices = [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.8, top_k=40),
        SamplingParams(seed=3, top_p=0.9),
        SamplingParams(seed=4, temperature=1.5, top_p=0.99, min_p=0.01),
        SamplingParams(seed=5, repetition_penalty=1.3, presence_penalty=0.5),
        GREEDY,
        SamplingParams(seed=6, top_k=2000),
    ]
    requests = [
        SampleRequest(row, row % 3, row, choices[row % len(choices)], tuple(range(row + 5)), 3)
        for row in range(40)
    ]
    sampler = Sampler(3000)
    together = sampler.sample(logits, requests)
    alone = [sampler.sample(logits[row : row + 1], [requests[row]])[0] for row in range(40)]
    backwards = sampler.sample(logits.flip(0), requests[::-1])[::-1]
    assert together == alone == backwards


def test_logits_are_left_unchanged() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    params = SamplingParams(top_k=3, repetition_penalty=2.0, logit_bias={4: 3.0})
    Sampler(50).sample(logits, [request(params, history=(1, 2)), request(GREEDY)])
    assert torch.equal(logits, before)


def test_half_precision_logits_are_taken() -> None:
    logits = torch.tensor([[0.0, 4.0, 1.0]], dtype=torch.bfloat16)
    assert Sampler(3).sample(logits, [request(SamplingParams(top_k=1))])[0].token_id == 1


def test_banned_tokens_are_never_drawn() -> None:
    assert sample_one([5.0, 1.0, 0.0], GREEDY, banned=(0,)) == 1
    assert sample_one([5.0, 1.0, 0.0], SamplingParams(), banned=(0, 1)) == 2


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    params = SamplingParams(temperature=0.0, logit_bias={99: 5.0, -1: 5.0}, repetition_penalty=2.0)
    assert sample_one([1.0, 2.0], params, banned=(2, 77, -1), history=(50, 1)) == 0


def test_ban_of_the_whole_vocabulary_is_void() -> None:
    assert sample_one([1.0, 2.0], GREEDY, banned=(0, 1)) == 1


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.5)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_gives_no_token_and_spares_its_neighbours(
    params: SamplingParams, bad: float
) -> None:
    asked = replace(params, logprobs=1)
    rows = torch.tensor([[0.0, 1.0, 9.0], [0.0, bad, 1.0], [0.0, 9.0, 1.0]])
    drawn = Sampler(3).sample(rows, [SampleRequest(key, 0, 0, asked) for key in (1, 2, 3)])
    assert [(token.key, token.token_id) for token in drawn] == [(1, 2), (3, 1)]


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0])
def test_a_tiny_repetition_penalty_does_not_overflow(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=1e-38)
    assert sample_one([3.0, 2.0, 1.0], params, history=(0, 2)) in (0, 2)


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="logits"):
        Sampler(4).sample(torch.zeros(1, 3), [request(GREEDY)])


def test_no_requests_give_no_tokens() -> None:
    assert Sampler(4).sample(torch.zeros(0, 4), []) == []


def penalised(
    logits: list[float], history: list[int], prompt_tokens: int, params: SamplingParams
) -> list[float]:
    """The penalties in plain Python, after their definitions."""
    result = list(logits)
    for token in set(history):
        positive = result[token] > 0
        result[token] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
    for token in history[prompt_tokens:]:
        result[token] -= params.frequency_penalty
    for token in set(history[prompt_tokens:]):
        result[token] -= params.presence_penalty
    return result


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 7), max_size=12),
    st.integers(0, 12),
    st.floats(0.5, 2.0),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.integers(0, 1000),
)
def test_penalties_equal_their_definition(
    history: list[int], prompt: int, repetition: float, frequency: float, presence: float, seed: int
) -> None:
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    logits = torch.randn(8, generator=torch.Generator().manual_seed(seed)).tolist()
    expected = penalised(logits, history, prompt, params)
    token_id = sample_one(logits, params, history=tuple(history), prompt_tokens=prompt)
    assert expected[token_id] == pytest.approx(max(expected), abs=1e-5)


def test_logprobs_are_of_the_models_own_logits() -> None:
    logits = [2.0, 1.0, 0.5, -1.0]
    log_total = math.log(sum(map(math.exp, logits)))
    params = SamplingParams(temperature=0.5, logprobs=2, top_k=1, logit_bias={3: 50.0})
    token = Sampler(4).sample(torch.tensor([logits]), [request(params)])[0]
    assert token.logprob is not None
    assert token.token_id == token.logprob.token_id == 3
    assert token.logprob.logprob == pytest.approx(logits[3] - log_total, abs=1e-5)
    assert [token_id for token_id, _ in token.logprob.top] == [0, 1]
    assert [value for _, value in token.logprob.top] == pytest.approx(
        [2 - log_total, 1 - log_total], abs=1e-5
    )


def test_logprobs_come_only_where_asked_and_as_many_as_asked() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    wanted = [None, 0, 20]
    tokens = Sampler(6).sample(
        logits, [request(SamplingParams(temperature=0.0, logprobs=count)) for count in wanted]
    )
    assert tokens[0].logprob is None
    assert [len(token.logprob.top) for token in tokens[1:] if token.logprob is not None] == [0, 6]
