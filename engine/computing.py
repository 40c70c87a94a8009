"""Edge: what a device gives once a model is on it."""

from dataclasses import dataclass

from engine.contract import StepRunner
from engine.drafting.runner_drafter import RunnerDrafter
from engine.kv_cache import KvCache


@dataclass(frozen=True, slots=True)
class Computing:
    """Runs steps on one device. `pool_blocks` of the cache's blocks may be given to sequences."""

    runner: StepRunner
    cache: KvCache
    pool_blocks: int
    drafter: RunnerDrafter | None
