"""Edge: loads what a worker's settings say about guessing tokens on the torch thread."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.contract import StepRunner
from engine.cpu.attention import CpuAttention
from engine.drafting.draft_model import DraftModel
from engine.drafting.eagle import EagleDrafter, EagleHead, eagle_config
from engine.drafting.medusa import MedusaDrafter, read_medusa
from engine.drafting.rejection import GuessedWeights, GuessSampler, RejectionSampler
from engine.drafting.runner_drafter import RunnerDrafter
from engine.kv.blocks import BlockPool
from engine.kv.kv_cache import KvCache
from engine.models.model_config import ModelConfig, read_json, read_model_config
from engine.models.model_source import resolve_model
from engine.sampling.sampler import Sampler
from tandem.errors import ConfigError
from tandem.worker_config import SpeculativeConfig, WorkerConfig

METHODS = ("ngram", "draft_model", "medusa", "eagle")
ACCEPTANCES = ("exact", "rejection")


class HeadAndTail(Protocol):
    """What drafters use of the model that they guess for."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids int64 [tokens] to [tokens, hidden]."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """Normed last hidden states [rows, hidden] to logits [rows, vocabulary]."""
        ...


class SmallEngine(Protocol):
    """What a draft model is, once loaded."""

    @property
    def runner(self) -> StepRunner:
        """Runs its steps."""
        ...

    @property
    def context_tokens(self) -> int:
        """The longest sequence that it can read."""
        ...

    def close(self) -> None:
        """Gives its memory back."""
        ...


LoadSmall = Callable[[WorkerConfig, Sampler], SmallEngine]
"""Loads a draft model whose tokens the sampler draws."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """The sampler of the model itself, and who guesses for it on the torch thread, if anybody does."""

    sampler: Sampler
    drafter: RunnerDrafter | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """The model that is guessed for."""

    worker: WorkerConfig
    config: ModelConfig
    decoder: HeadAndTail
    dtype: torch.dtype
    device: torch.device


def load_drafting(target: Target, load_small: LoadSmall) -> Drafting:
    """Raises ConfigError for settings that do not work together, ModelError for files."""
    plain = Sampler(target.config.vocabulary_tokens)
    wanted = target.worker.speculative
    if wanted is None:
        return Drafting(plain)
    _check(wanted, target.device)
    if wanted.method == "draft_model":
        return _draft_model(target, wanted, load_small)
    if wanted.method == "medusa":
        heads = read_medusa(_folder(wanted), target.config, target.dtype, target.device)
        return Drafting(plain, MedusaDrafter(heads))
    if wanted.method == "eagle":
        return Drafting(plain, _eagle(target, wanted))
    return Drafting(plain)


def _check(wanted: SpeculativeConfig, device: torch.device) -> None:
    if wanted.method not in METHODS:
        raise ConfigError(
            f"speculative.method: {wanted.method!r} is unknown; allowed: none, {', '.join(METHODS)}"
        )
    if wanted.acceptance not in ACCEPTANCES:
        raise ConfigError(
            f"speculative.acceptance: {wanted.acceptance!r} is unknown; allowed: {', '.join(ACCEPTANCES)}"
        )
    if wanted.acceptance == "rejection" and wanted.method != "draft_model":
        raise ConfigError(
            "speculative.acceptance: rejection needs guesses that were drawn; "
            f"allowed with {wanted.method}: exact"
        )
    if wanted.method == "eagle" and device.type != "cpu":
        raise ConfigError("speculative.method: eagle runs on the CPU only; allowed here: ngram, draft_model")


def _draft_model(target: Target, wanted: SpeculativeConfig, load_small: LoadSmall) -> Drafting:
    if wanted.source is None:
        raise ConfigError("speculative.source: method draft_model needs a model")
    folder = resolve_model(wanted.source)
    config = read_model_config(folder)
    check_same_tokenizer(target.worker.model_folder, folder)
    vocabulary = min(config.vocabulary_tokens, target.config.vocabulary_tokens)
    settings = replace(
        target.worker,
        model_folder=folder,
        pool_blocks=wanted.pool_blocks,
        speculative=None,
        context_tokens=None,
        kv_dtype=None,
        kv_selection=None,
    )
    guessed = GuessedWeights() if wanted.acceptance == "rejection" else None
    if guessed is not None and config.vocabulary_tokens != target.config.vocabulary_tokens:
        raise ConfigError(
            "speculative.acceptance: rejection needs models of one vocabulary size; "
            f"{folder} has {config.vocabulary_tokens} tokens, not {target.config.vocabulary_tokens}"
        )
    sampler = Sampler(config.vocabulary_tokens)
    small = load_small(settings, sampler if guessed is None else GuessSampler(vocabulary, guessed))
    drafter = DraftModel(
        small.runner,
        BlockPool(wanted.pool_blocks, settings.block_size, prefix_cache=False),
        context_tokens=small.context_tokens,
        vocabulary_tokens=vocabulary,
        chunk_tokens=settings.token_budget,
        guessed=guessed,
        on_close=small.close,
    )
    own = target.config.vocabulary_tokens
    return Drafting(Sampler(own) if guessed is None else RejectionSampler(own, guessed), drafter)


def _eagle(target: Target, wanted: SpeculativeConfig) -> EagleDrafter:
    head = EagleHead(_folder(wanted), target.config, target.dtype)
    shape = eagle_config(target.config)
    block_size = target.worker.block_size
    cache = KvCache(shape, wanted.pool_blocks, block_size, target.dtype, target.device)
    return EagleDrafter(
        head,
        BlockPool(wanted.pool_blocks, block_size, prefix_cache=False),
        CpuAttention(cache, shape),
        target.decoder.embed,
        target.decoder.logits,
        on_close=cache.close,
    )


def _folder(wanted: SpeculativeConfig) -> Path:
    if wanted.source is None:
        raise ConfigError(f"speculative.source: method {wanted.method} needs the folder of its heads")
    return Path(wanted.source).expanduser()


def check_same_tokenizer(model: Path, draft: Path) -> None:
    """Raises ConfigError unless both folders' tokenizers give every token the same id."""
    ours, theirs = (_vocabulary(folder) for folder in (model, draft))
    if ours != theirs:
        raise ConfigError(f"speculative.source: the tokenizer of {draft} is not that of {model}")


def _vocabulary(folder: Path) -> dict[str, object]:
    document = read_json(folder / "tokenizer.json")
    model = document.get("model")
    return {
        "model": {key: model.get(key) for key in ("vocab", "merges")} if isinstance(model, Mapping) else None,
        "added": [
            (token.get("id"), token.get("content")) for token in document.get("added_tokens") or () if token
        ],
    }
