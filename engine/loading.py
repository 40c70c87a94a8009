"""Edge: loads everything a worker computes with."""

from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from engine.cpu_attention import CpuAttention
from engine.decoder import Decoder
from engine.drafting.loading import Target, load_drafting
from engine.drafting.runner_drafter import RunnerDrafter
from engine.kv_cache import KvCache
from engine.model_config import ModelConfig, read_model_config
from engine.progress import Progress
from engine.sampler import Sampler
from engine.torch_runner import TorchStepRunner
from engine.weights import read_weights, weight_files
from tandem.digest import compatibility_digest
from tandem.errors import ConfigError
from tandem.worker_config import WorkerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What weights and KV may be computed and kept in."""

DEVICES = ("cpu",)
"""Kinds of device that an attention back-end exists for."""

_REORDER_LIMIT_BYTES = 4 * 1024**3
"""Up to this size weights are copied into oneDNN's own layout; larger ones stay mapped and shared."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A model ready to run; close it when its last step has ended."""

    model_config: ModelConfig
    runner: TorchStepRunner
    cache: KvCache
    eos_ids: tuple[int, ...]
    digest: str
    """Compatibility digest: see tandem.digest."""
    context_tokens: int
    """Bound on prompt and output together: the model's, or less if the worker's settings say so."""
    drafter: RunnerDrafter | None = None
    """What guesses tokens at the end of the runner's steps."""

    def close(self) -> None:
        """Gives the KV pool back; idempotent."""
        if self.drafter is not None:
            self.drafter.close()
        self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _load_small(config: WorkerConfig, sampler: Sampler) -> LoadedEngine:
    return load_engine(config, sampler=sampler)


def load_engine(
    config: WorkerConfig, progress: Progress | None = None, sampler: Sampler | None = None
) -> LoadedEngine:
    """Loads the folder that the settings name; `progress` follows the weights, `sampler` draws the tokens.

    Raises ModelError for the model and ConfigError for a dtype or device that is not supported.
    """
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype {config.dtype!r} is not supported; supported: {', '.join(DTYPES)}.")
    if config.device not in DEVICES:
        raise ConfigError(f"device {config.device!r} is not supported; supported: {', '.join(DEVICES)}.")
    dtype, device = DTYPES[config.dtype], torch.device(config.device)
    torch.set_num_threads(config.threads)
    folder = config.model_folder
    model = read_model_config(folder)
    weights = read_weights(folder, model, dtype, device, progress)
    stored_bytes = sum(path.stat().st_size for path in weight_files(folder))
    with torch.inference_mode():
        decoder = Decoder(model, weights, reorder=stored_bytes <= _REORDER_LIMIT_BYTES)
    drafting = load_drafting(Target(config, model, decoder, dtype, device), _load_small)
    cache = KvCache(model, config.pool_blocks, config.block_size, dtype, device)
    runner = TorchStepRunner(
        decoder,
        cache,
        CpuAttention(cache, model),
        sampler or drafting.sampler,
        device,
        config.threads,
        drafting.drafter,
    )
    return LoadedEngine(
        model_config=model,
        runner=runner,
        cache=cache,
        eos_ids=model.eos_ids,
        digest=compatibility_digest(
            *(folder, config.dtype, config.block_size, config.codec, config.codec_thresholds)
        ),
        context_tokens=min(model.context_tokens, config.context_tokens or model.context_tokens),
        drafter=drafting.drafter,
    )
