"""Edge: how much of a decode step is spent outside kernels: torch's, by its profiler, and native ones."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from engine.native.team import LaunchTimes, Team


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Where the wall time of profiled steps went; all threads' shares of the same time are counted once."""

    wall_s: float
    operators_s: float
    """Inside operators of torch that Python called."""
    operators: int
    native_s: float
    """Inside calls of native loops, which no operator contains."""
    native_calls: int

    @property
    def outside_s(self) -> float:
        """In neither: Python, schedulers, some of the profiler's cost."""
        return self.wall_s - self.operators_s - self.native_s

    @property
    def overhead_share(self) -> float:
        """Share of the wall time in neither."""
        return self.outside_s / self.wall_s


def profile_steps(work: Callable[[], object], team: Team | None) -> StepProfile:
    """Profiles what `work` runs on this thread; `team` runs its native loops, if there are any."""
    with (
        nullcontext(LaunchTimes()) if team is None else team.timed() as native,
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled,
    ):
        began_s = time.perf_counter()
        work()
        wall_s = time.perf_counter() - began_s
    outermost = [event for event in profiled.events() or () if event.cpu_parent is None]
    operators_s = sum(event.time_range.elapsed_us() for event in outermost) / 1e6
    return StepProfile(wall_s, operators_s, len(outermost), native.seconds, native.calls)
