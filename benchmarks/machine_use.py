"""Edge: how much of the machine others used while something was measured on it."""

import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds since some start: of the clock, of all cores at work, of this process and all it started."""

    at_s: float
    busy_s: float
    own_s: float


def cpu_times() -> CpuTimes:
    """Now. Processes of ours that have ended since are counted as others."""
    machine = psutil.cpu_times()
    busy_s = machine.user + machine.nice + machine.system
    me = psutil.Process()
    own_s = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            spent = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        own_s += spent.user + spent.system
    return CpuTimes(time.monotonic(), busy_s, own_s)


def others_share(before: CpuTimes, after: CpuTimes, cores: int) -> float:
    """The share of `cores` cores that others were at work on in between; 0 to 1."""
    others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return min(1.0, max(0.0, others_s / (cores * (after.at_s - before.at_s))))
