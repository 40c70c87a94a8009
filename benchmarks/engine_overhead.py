"""Edge: how much of a decode step is spent outside torch's kernels, from torch's own profiler."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Where the wall time of profiled steps went."""

    wall_s: float
    kernels_s: float
    """Inside operators that Python called, all threads' shares of the same time counted once."""
    operators: int
    """How many of them were called."""

    @property
    def overhead_share(self) -> float:
        """Share of the wall time outside operators: Python, schedulers, some of the profiler's cost."""
        return 1.0 - self.kernels_s / self.wall_s


def profile_steps(work: Callable[[], object]) -> StepProfile:
    """Profiles what `work` runs on this thread."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        began_s = time.perf_counter()
        work()
        wall_s = time.perf_counter() - began_s
    outermost = [event for event in profiled.events() or () if event.cpu_parent is None]
    kernels_s = sum(event.time_range.elapsed_us() for event in outermost) / 1e6
    return StepProfile(wall_s, kernels_s, len(outermost))
