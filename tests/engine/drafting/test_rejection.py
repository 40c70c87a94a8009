"""Rejection sampling of a draft model's guesses gives the model's own distribution."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from scipy import stats

from benchmarks.decode_alone import Decoded, decode_alone
from decode_worker.speculation import Speculation
from engine.drafting.contract import RunnerDrafts
from engine.drafting.rejection import GuessedWeights, GuessSampler, RejectionSampler
from engine.kv.blocks import BlockPool
from engine.loading import load_engine
from engine.sampling.random_numbers import Purpose, uniform, uniform_for
from engine.sampling.sampler import Sampler
from engine.sampling.token_weights import filtered_weights
from engine.step import SampleRequest
from tandem.sampling import SamplingParams
from tandem.worker_config import SpeculativeConfig, WorkerConfig
from tests.engine.drafting.always import Always
from tests.engine.drafting.folders import SIZE, save_model, save_near_copy, worker
from tests.engine.tiny_models import family_configs, random_model, reference_logits

PROMPT = [5, 6, 7, 8, 5, 6]
PARAMS = SamplingParams(temperature=1.5, top_k=3, max_tokens=4, ignore_eos=True)
BATCH, BATCHES = 250, 6
SIGNIFICANCE = 1e-3


def goodness(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """p-value of a chi-square test; cells that expect fewer than five are taken together."""
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    large = [cell for cell, share in expected.items() if share * total >= 5]
    observed: list[float] = [counts[cell] for cell in large]
    wanted = [expected[cell] * total for cell in large]
    if len(large) < len(expected):
        observed.append(total - sum(observed))
        wanted.append(total - sum(wanted))
    return float(stats.chisquare(observed, wanted).pvalue)


def outputs(config: WorkerConfig) -> Decoded:
    """Many outputs of one prompt, each with a seed of its own."""
    runs: list[Decoded] = []
    for batch in range(BATCHES):
        # A drafter knows sequences by keys, which a scheduler gives out once.
        with load_engine(config) as engine:
            speculation = Speculation(RunnerDrafts(), Always(), 3)
            runs.append(
                decode_alone(
                    engine.runner,
                    BlockPool(config.pool_blocks, SIZE),
                    [PROMPT] * BATCH,
                    PARAMS,
                    context_tokens=64,
                    speculation=speculation,
                    first_seed=batch * BATCH,
                )
            )
    return Decoded(
        tuple(output for run in runs for output in run.outputs),
        (),
        sum(run.steps for run in runs),
        0.0,
        sum(run.guesses for run in runs),
        sum(run.accepted for run in runs),
    )


def exact_shares(folder: Path, depth: int) -> dict[tuple[int, ...], float]:
    """Probability of each beginning of the output, from transformers' logits."""
    model = random_model(family_configs()["llama"])
    shares: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(depth):
        longer: dict[tuple[int, ...], float] = {}
        for path, share in shares.items():
            weights = filtered_weights(reference_logits(model, [*PROMPT, *path])[-1:].clone(), [PARAMS])[0]
            weights = weights.double() / weights.double().sum()
            for token in weights.nonzero().flatten().tolist():
                longer[*path, token] = share * float(weights[token])
        shares = longer
    return shares


def test_drawn_output_of_a_tiny_model_has_its_distribution(tmp_path: Path) -> None:
    """Chi-square over the first four tokens; and rejection accepts more than comparing does."""
    folder = save_model(tmp_path / "model")
    draft = SpeculativeConfig(
        "draft_model",
        3,
        str(save_near_copy(tmp_path / "draft", 0.15)),
        acceptance="rejection",
        pool_blocks=1500,
    )
    config = replace(worker(folder, draft), pool_blocks=2000, token_budget=4096)
    rejecting = outputs(config)
    assert goodness(Counter(rejecting.outputs), exact_shares(folder, 4)) > SIGNIFICANCE
    assert 0 < rejecting.accepted < rejecting.guesses
    exact = outputs(replace(config, speculative=replace(draft, acceptance="exact")))
    assert goodness(Counter(exact.outputs), exact_shares(folder, 4)) > SIGNIFICANCE
    assert rejecting.accepted / rejecting.guesses > exact.accepted / exact.guesses


def test_one_position_has_the_models_distribution_whatever_the_guesses_had() -> None:
    """Over 20,000 positions: target and guess share two of their four tokens."""
    guessed = GuessedWeights()
    target_logits = torch.tensor([0.0, 1.0, 0.3, -9.0, -9.0, -0.5])
    guess_logits = torch.tensor([-9.0, 0.1, 1.2, 0.5, 0.0, -9.0])
    requests = [SampleRequest(0, index, 0, SamplingParams(seed=3)) for index in range(20_000)]
    guesses = GuessSampler(6, guessed).sample(guess_logits.expand(len(requests), -1), requests)
    drawn = RejectionSampler(6, guessed).sample(target_logits.expand(len(requests), -1), requests)
    shares = target_logits.double().softmax(0).tolist()
    expected: dict[tuple[int, ...], float] = {(token,): share for token, share in enumerate(shares)}
    assert goodness(Counter((token.token_id,) for token in drawn), expected) > SIGNIFICANCE
    held = sum(guess.token_id == token.token_id for guess, token in zip(guesses, drawn, strict=True))
    best = torch.minimum(target_logits.softmax(0), guess_logits.softmax(0)).sum()
    assert abs(held / len(requests) - float(best)) < 0.015


def test_rows_without_a_guess_and_greedy_rows_are_drawn_as_ever() -> None:
    guessed = GuessedWeights({(0, 0, 5): (2, torch.tensor([0.0, 0.0, 1.0]))})
    logits = torch.tensor([[1.0, 0.9, 0.8]]).expand(3, -1)
    requests = [
        SampleRequest(0, 0, 4, SamplingParams(seed=1)),
        SampleRequest(0, 0, 5, SamplingParams(temperature=0.0)),
        SampleRequest(7, 0, 5, SamplingParams(seed=1)),
    ]
    plain = Sampler(3).sample(logits, requests)
    assert RejectionSampler(3, guessed).sample(logits, requests) == plain


def test_random_numbers_of_different_purposes_are_independent() -> None:
    positions = list(itertools.product(range(20), range(20), range(5)))

    def series(purpose: Purpose | None) -> Sequence[float]:
        draw = uniform if purpose is None else lambda *at: uniform_for(purpose, *at)
        return [draw(*at) for at in positions]

    for one, other in itertools.combinations((None, *Purpose), 2):
        assert abs(float(stats.pearsonr(series(one), series(other)).statistic)) < 0.08
