"""Edge: loads everything a worker computes with."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Self

import structlog
import torch
from torch import Tensor

from engine.computing import Computing
from engine.contract import StepRunner
from engine.cpu.attention import CpuAttention
from engine.cpu.int8_linear import int8_linear
from engine.cpu.layout_choice import choose_linears
from engine.cpu.linear import stored_linear
from engine.decoder import Decoder
from engine.drafting.loading import Target, load_drafting
from engine.drafting.runner_drafter import RunnerDrafter
from engine.kv.kv_cache import KvCache, OpenMemory
from engine.kv_policies.loading import check_kv_policies, open_kv
from engine.models.model_config import ModelConfig, read_model_config
from engine.models.weights import linear_shapes, read_weights, unmapped, weight_files
from engine.progress import Progress
from engine.sampling.sampler import Sampler
from engine.torch_runner import TorchStepRunner
from tandem.digest import compatibility_digest
from tandem.errors import ConfigError
from tandem.worker_config import WorkerConfig

if TYPE_CHECKING:
    from engine.cuda.accelerator import Accelerator
    from engine.native.team import Team

_log = structlog.get_logger("tandem.engine")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What weights and KV may be computed and kept in."""

_COPY_LIMIT_BYTES = 4 * 1024**3
"""Up to this size weights are copied into the fastest layouts; larger ones stay mapped and shared."""


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A model ready to run; close it when its last step has ended."""

    model_config: ModelConfig
    runner: StepRunner
    cache: KvCache
    pool_blocks: int
    """Blocks of the cache that may be given to sequences."""
    eos_ids: tuple[int, ...]
    digest: str
    """Compatibility digest: see tandem.digest."""
    context_tokens: int
    """Bound on prompt and output together: the model's, or less if the worker's settings say so."""
    drafter: RunnerDrafter | None = None
    """What guesses tokens at the end of the runner's steps."""
    team: "Team | None" = None
    """Threads of native loops; None where torch's operators do all."""

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
    config: WorkerConfig,
    progress: Progress | None = None,
    sampler: Sampler | None = None,
    open_memory: OpenMemory | None = None,
) -> LoadedEngine:
    """Loads the folder that the settings name; `progress` follows the weights, `sampler` draws the tokens.

    `open_memory` may say where a pool in host memory lies.
    Raises ModelError for the model and ConfigError for a dtype, device or KV policy that is not supported.
    """
    _check(config)
    accelerator = None if config.device == "cpu" else _accelerator(config.device)
    device = torch.device("cpu") if accelerator is None else accelerator.device
    torch.set_num_threads(config.threads)
    folder, dtype = config.model_folder, DTYPES[config.dtype]
    model = read_model_config(folder)
    weights = read_weights(folder, model, dtype, device, progress)
    if accelerator is None:
        computing = _on_cpu(config, model, weights, sampler, open_memory)
    else:
        from engine.cuda.loading import load_on_device

        computing = load_on_device(config, model, weights, dtype, accelerator, _load_small, sampler)
    return LoadedEngine(
        model_config=model,
        runner=computing.runner,
        cache=computing.cache,
        pool_blocks=computing.pool_blocks,
        eos_ids=model.eos_ids,
        digest=compatibility_digest(
            folder,
            config.dtype,
            config.block_size,
            config.codec,
            config.codec_thresholds,
            stored_as=config.kv_dtype,
            weights_dtype=config.weights_dtype,
        ),
        context_tokens=min(model.context_tokens, config.context_tokens or model.context_tokens),
        drafter=computing.drafter,
        team=computing.team,
    )


def _check(config: WorkerConfig) -> None:
    """Raises ConfigError for types and KV policies that are not supported."""
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype {config.dtype!r} is not supported; supported: {', '.join(DTYPES)}.")
    if config.weights_dtype is not None and (config.weights_dtype != "int8" or config.device != "cpu"):
        raise ConfigError(
            f"weights_dtype {config.weights_dtype!r} on {config.device} is not supported; "
            "supported: int8 on cpu."
        )
    check_kv_policies(config)


def _accelerator(name: str) -> "Accelerator":
    """Raises ConfigError when there is no such device, or nothing to run it with."""
    if find_spec("triton") is None:
        raise ConfigError(f"device {name!r} needs the package triton, which is not installed.")
    from engine.cuda.accelerator import CudaAccelerator

    return CudaAccelerator(name)


def _on_cpu(
    config: WorkerConfig,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    sampler: Sampler | None,
    open_memory: OpenMemory | None,
) -> Computing:
    if config.pool_blocks < 1:
        raise ConfigError("pool_blocks 0 (what fits) needs a GPU; name a number of blocks for the CPU.")
    dtype, device = DTYPES[config.dtype], torch.device("cpu")
    team = _native_team(config, dtype)
    with torch.inference_mode():
        decoder = _decoder(config, model, weights, dtype, team)
    drafting = load_drafting(Target(config, model, decoder, dtype, device), _load_small)
    kv = open_kv(config, model, dtype, lambda cache: CpuAttention(cache, model, team), open_memory)
    runner = TorchStepRunner(
        decoder,
        kv.cache,
        kv.attention,
        sampler or drafting.sampler,
        device,
        config.threads,
        drafting.drafter,
    )
    return Computing(kv.around(runner), kv.cache, config.pool_blocks, drafting.drafter, team)


def _native_team(config: WorkerConfig, dtype: torch.dtype) -> "Team | None":
    """Threads for native loops, where these can do this dtype's work."""
    from engine.native.product import multiplies
    from engine.native.team import team_of_torch

    if not multiplies(dtype):
        _log.info("native loops are not used", reason=f"this processor lacks instructions for {dtype}")
        return None
    team = team_of_torch(config.threads)
    if team is None:
        _log.info("native loops are not used", reason="torch's threads are not an OpenMP runtime's with GOMP")
    else:
        _log.info("native loops are used", threads=team.threads)
    return team


def _native_rows(team: "Team | None") -> int:
    if team is None:
        return 0
    from engine.native.product import MOST_ROWS

    return MOST_ROWS


def _decoder(
    config: WorkerConfig,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    team: "Team | None",
) -> Decoder:
    if config.weights_dtype is not None:
        return Decoder(model, unmapped(weights), int8_linear, team)
    stored_bytes = sum(path.stat().st_size for path in weight_files(config.model_folder))
    if stored_bytes > _COPY_LIMIT_BYTES:
        return Decoder(model, weights, stored_linear, team)
    product = choose_linears(linear_shapes(model), dtype, native_rows=_native_rows(team))
    return Decoder(model, unmapped(weights), product, team)
