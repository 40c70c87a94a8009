"""Edge: the KV pool and attention that a worker's settings ask for, on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.attention import AttentionBackend
from engine.contract import StepRunner
from engine.kv_cache import KvCache, OpenMemory
from engine.kv_policies.capabilities import FULL, INT8, QUEST, kv_fault, kv_settings
from engine.kv_policies.page_attention import PageAttention
from engine.kv_policies.page_runner import PageRunner
from engine.model_config import ModelConfig
from tandem.errors import ConfigError
from tandem.worker import Role
from tandem.worker_config import KvSelectionConfig, WorkerConfig

POLICIES = (FULL, QUEST)
"""What kv_selection may name."""

LEAST_PAGES = 2
"""The newest block, and one that Quest chooses."""


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
    if config.kv_selection is not None:
        _check_selection(config.kv_selection, config.role)
    fault = kv_fault(kv_settings(config))
    if fault is not None:
        raise ConfigError(f"{fault}.")


def _check_selection(selection: KvSelectionConfig, role: Role) -> None:
    if role is Role.PREFILL:
        raise ConfigError("kv_selection is for decode workers: prompts are read with all of their KV.")
    if selection.policy not in POLICIES:
        raise ConfigError(f"kv_selection {selection.policy!r} is unknown; allowed: {', '.join(POLICIES)}.")
    if selection.pages < LEAST_PAGES:
        raise ConfigError(f"kv_selection needs {LEAST_PAGES} pages or more, not {selection.pages}.")


def open_kv(
    config: WorkerConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    full: Callable[[KvCache], AttentionBackend],
    open_memory: OpenMemory | None = None,
) -> KvParts:
    """The pool and its attention; `dtype` is the weights', `full` attends without a policy.

    `open_memory` may say where the pool lies. The caller closes the pool. Raises ModelError when it cannot
    be had.
    """
    stored = torch.int8 if config.kv_dtype == INT8 else dtype
    device = torch.device("cpu")
    cache = KvCache(model, config.pool_blocks, config.block_size, stored, device, open_memory)
    selection = config.kv_selection
    if selection is not None and selection.policy == QUEST:
        return KvParts(cache, PageAttention(cache, model, selection.pages))
    if stored == torch.int8:
        return KvParts(cache, PageAttention(cache, model))
    return KvParts(cache, full(cache))
