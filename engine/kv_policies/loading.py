"""Edge: the KV pool and attention that a worker's settings ask for, on the CPU."""

from dataclasses import dataclass

import torch

from engine.attention import AttentionBackend
from engine.contract import StepRunner
from engine.cpu_attention import CpuAttention
from engine.kv_cache import KvCache
from engine.kv_policies.capabilities import FULL, INT8, QUEST, kv_fault, kv_settings
from engine.kv_policies.page_attention import PageAttention
from engine.kv_policies.page_runner import PageRunner
from engine.model_config import ModelConfig
from tandem.errors import ConfigError
from tandem.worker_config import WorkerConfig

POLICIES = (FULL, QUEST)
"""What kv_selection may name."""


@dataclass(frozen=True, slots=True)
class KvParts:
    """A pool and who attends over it."""

    cache: KvCache
    attention: AttentionBackend

    def around(self, runner: StepRunner) -> StepRunner:
        """The runner to use in place of one that attends with `attention`."""
        return PageRunner(runner, self.attention) if isinstance(self.attention, PageAttention) else runner


def check_kv_policies(config: WorkerConfig) -> None:
    """Raises ConfigError, one sentence, for policies that are unknown or do not go together."""
    if config.kv_dtype not in (None, INT8):
        raise ConfigError(f"kv_dtype {config.kv_dtype!r} is not supported; allowed: {INT8}, or none.")
    if config.kv_selection is not None and config.kv_selection.policy not in POLICIES:
        allowed = ", ".join(POLICIES)
        raise ConfigError(f"kv_selection {config.kv_selection.policy!r} is unknown; allowed: {allowed}.")
    fault = kv_fault(kv_settings(config))
    if fault is not None:
        raise ConfigError(f"{fault}.")


def open_kv(config: WorkerConfig, model: ModelConfig, dtype: torch.dtype) -> KvParts:
    """The pool and its attention; `dtype` is the weights'. The caller closes the pool.

    Raises ModelError when the pool cannot be had.
    """
    stored = torch.int8 if config.kv_dtype == INT8 else dtype
    cache = KvCache(model, config.pool_blocks, config.block_size, stored, torch.device("cpu"))
    selection = config.kv_selection
    if selection is not None and selection.policy == QUEST:
        return KvParts(cache, PageAttention(cache, model, selection.pages))
    if stored == torch.int8:
        return KvParts(cache, PageAttention(cache, model))
    return KvParts(cache, CpuAttention(cache, model))
