"""Draft models, Medusa and EAGLE heads: whatever they guess, exact acceptance changes no token."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.decode_alone import Decoded, decode_alone
from decode_worker.speculation import Speculation
from engine.drafting.contract import RunnerDrafts
from engine.kv.blocks import BlockPool
from engine.loading import load_engine
from tandem.errors import ConfigError, ModelError
from tandem.sampling import SamplingParams
from tandem.worker_config import SpeculativeConfig, WorkerConfig
from tests.engine.drafting.always import Always
from tests.engine.drafting.folders import (
    BLOCKS,
    SIZE,
    save_eagle,
    save_medusa,
    save_model,
    save_near_copy,
    worker,
)

PROMPTS = ([5, 6, 7, 8, 5, 6], [9, 9, 9], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [3])
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
DRAWN = SamplingParams(seed=5, temperature=0.3, max_tokens=30, ignore_eos=True)
PENALISED = SamplingParams(seed=5, temperature=0.5, repetition_penalty=1.2, max_tokens=30, ignore_eos=True)


def decode(config: WorkerConfig, params: SamplingParams) -> Decoded:
    """All prompts in one batch; every guess is verified."""
    speculation = None
    if config.speculative is not None:
        speculation = Speculation(RunnerDrafts(), Always(), config.speculative.tokens)
    with load_engine(config) as engine:
        return decode_alone(
            engine.runner,
            BlockPool(BLOCKS, SIZE),
            PROMPTS,
            params,
            context_tokens=engine.context_tokens,
            speculation=speculation,
        )


def near_copy(folder: Path) -> SpeculativeConfig:
    """A draft model that is often right."""
    return SpeculativeConfig("draft_model", 4, str(save_near_copy(folder, 0.01)), pool_blocks=64)


def stranger(folder: Path) -> SpeculativeConfig:
    """A draft model that is hardly ever right."""
    return SpeculativeConfig("draft_model", 3, str(save_model(folder, seed=9)), pool_blocks=64)


def cramped(folder: Path) -> SpeculativeConfig:
    """A draft model without room for all sequences."""
    return replace(near_copy(folder), pool_blocks=12)


def medusa(folder: Path) -> SpeculativeConfig:
    """Random heads."""
    return SpeculativeConfig("medusa", 7, str(save_medusa(folder)))


def eagle(folder: Path) -> SpeculativeConfig:
    """A random head."""
    return SpeculativeConfig("eagle", 6, str(save_eagle(folder)), pool_blocks=64)


@pytest.mark.parametrize("params", [GREEDY, DRAWN, PENALISED], ids=["greedy", "drawn", "penalised"])
@pytest.mark.parametrize("drafter", [near_copy, stranger, cramped, medusa, eagle])
def test_output_is_the_same_whoever_guesses(
    drafter: Callable[[Path], SpeculativeConfig], params: SamplingParams, tmp_path: Path
) -> None:
    config = worker(save_model(tmp_path / "model"))
    plain = decode(config, params)
    guessed = decode(replace(config, speculative=drafter(tmp_path / "drafter")), params)
    assert guessed.outputs == plain.outputs
    assert guessed.guesses > 0


def test_a_draft_model_that_is_the_model_itself_is_right_all_the_time(tmp_path: Path) -> None:
    """Greedy, and drawn with the same random numbers."""
    folder = save_model(tmp_path / "model")
    config = worker(folder, SpeculativeConfig("draft_model", 4, str(folder), pool_blocks=64))
    for params in (GREEDY, DRAWN):
        decoded = decode(config, params)
        assert decoded.accepted == decoded.guesses
        # 29 tokens, 5 a step, after few steps that only read the prompts.
        assert decoded.steps < 12


def test_missing_or_misshapen_heads_are_named(tmp_path: Path) -> None:
    config = worker(save_model(tmp_path / "model", family="qwen3"))
    other = SpeculativeConfig("eagle", 4, str(save_eagle(tmp_path / "eagle")))
    with pytest.raises(ModelError, match=r"q_proj.weight has shape \[32, 32\], expected \[48, 32\]"):
        load_engine(replace(config, speculative=other))
    empty = SpeculativeConfig("eagle", 4, str(tmp_path))
    with pytest.raises(ModelError, match=r"has none of: model\.safetensors"):
        load_engine(replace(config, speculative=empty))
    with pytest.raises(ConfigError, match="medusa needs the folder of its heads"):
        load_engine(replace(config, speculative=SpeculativeConfig("medusa", 4)))


def test_a_draft_model_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    config = worker(save_model(tmp_path / "model"))
    other = save_model(tmp_path / "other", ids=range(1, 102))
    with pytest.raises(ConfigError, match="is not that of"):
        load_engine(replace(config, speculative=SpeculativeConfig("draft_model", 4, str(other))))


@pytest.mark.parametrize(
    ("speculative", "problem"),
    [
        (SpeculativeConfig("oracle"), "method: 'oracle' is unknown; allowed: none, ngram"),
        (SpeculativeConfig("ngram", acceptance="perhaps"), "acceptance: 'perhaps' is unknown"),
        (SpeculativeConfig("ngram", acceptance="rejection"), "allowed with ngram: exact"),
        (SpeculativeConfig("draft_model"), "method draft_model needs a model"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    speculative: SpeculativeConfig, problem: str, tmp_path: Path
) -> None:
    config = worker(save_model(tmp_path / "model"))
    with pytest.raises(ConfigError, match=problem):
        load_engine(replace(config, speculative=speculative))
