"""Edge: what a device gives once a model is on it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.contract import StepRunner
from engine.drafting.runner_drafter import RunnerDrafter
from engine.kv.kv_cache import KvCache

if TYPE_CHECKING:
    from engine.native.team import Team


@dataclass(frozen=True, slots=True)
class Computing:
    """Runs steps on one device. `pool_blocks` of the cache's blocks may be given to sequences."""

    runner: StepRunner
    cache: KvCache
    pool_blocks: int
    drafter: RunnerDrafter | None
    team: "Team | None" = None
    """Threads of native loops; None where torch's operators do all."""
