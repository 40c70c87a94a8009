"""Edge: the KV pool and attention that a worker's settings ask for, on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.attention import AttentionBackend
from engine.contract import StepRunner
from engine.kv.kv_cache import KvCache, OpenMemory
from engine.kv_policies.capabilities import FULL, INT8, MORPH, QUEST, kv_budget, kv_fault, kv_settings
from engine.kv_policies.page_attention import PageAttention, Reading
from engine.kv_policies.page_runner import PageRunner
from engine.models.model_config import ModelConfig
from engine.native.team import Team, team_of_torch
from tandem.errors import ConfigError
from tandem.worker import Role
from tandem.worker_config import KvSelectionConfig, WorkerConfig

POLICIES = (FULL, QUEST, MORPH)
"""What kv_selection may name."""

FUSIONS = ("sum", "max")
"""How morph makes one score of the attention of several tokens."""

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
    if selection.window_tokens < 1 or selection.budget_tokens < 2 * selection.window_tokens:
        raise ConfigError(
            "kv_selection needs a budget of two windows or more, not "
            f"{selection.budget_tokens} tokens with a window of {selection.window_tokens}."
        )
    if selection.fusion not in FUSIONS:
        raise ConfigError(f"fusion {selection.fusion!r} is unknown; allowed: {', '.join(FUSIONS)}.")


def open_kv(
    config: WorkerConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    full: Callable[[KvCache], AttentionBackend],
    open_memory: OpenMemory | None = None,
) -> KvParts:
    """The pool and its attention; `dtype` is the weights', `full` attends without a policy.

    `open_memory` may say where the pool lies. The caller closes the pool. Raises ModelError when it cannot
    be had, ConfigError for a policy that this model or this build of torch cannot have.
    """
    stored, device = torch.int8 if config.kv_dtype == INT8 else dtype, torch.device("cpu")
    reading = _reading(config, model)
    team = None if reading is None else _team(config.threads)
    cache = KvCache(model, config.pool_blocks, config.block_size, stored, device, open_memory)
    if reading is None or team is None:
        return KvParts(cache, full(cache))
    return KvParts(cache, PageAttention(cache, model, team, reading))


def _reading(config: WorkerConfig, model: ModelConfig) -> Reading | None:
    """None without a policy."""
    selection, budget = config.kv_selection, kv_budget(config)
    if selection is not None and selection.policy == QUEST:
        return Reading(pages=selection.pages)
    if selection is not None and budget is not None:
        if any(window is not None for window in model.windows):
            raise ConfigError(
                "kv_selection morph does not go with a model whose layers see a window of tokens only: where "
                "KV was dropped, slots do not say how far back a token is."
            )
        return Reading(budget=budget, largest=selection.fusion == "max")
    return Reading() if config.kv_dtype == INT8 else None


def _team(threads: int) -> Team:
    team = team_of_torch(threads)
    if team is None:
        raise ConfigError(
            "kv_dtype int8 and kv_selection need a torch whose threads have GOMP's entry points."
        )
    return team
