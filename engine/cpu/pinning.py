"""Edge: keeps a worker's threads on the cores that its settings name, so that two do not share one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tandem.errors import ConfigError


def check_cores(cores: Sequence[int]) -> None:
    """Raises ConfigError naming a core that this process, or one that it starts, cannot run on."""
    if not cores:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("cores: this system cannot keep threads on chosen cores; allowed: none.")
    usable = os.sched_getaffinity(0)
    foreign = [core for core in cores if core not in usable]
    if foreign:
        allowed = ", ".join(map(str, sorted(usable)))
        raise ConfigError(f"cores: {foreign[0]} is not to be had on this machine; allowed: {allowed}.")


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """The calling thread, and every thread that starts from it meanwhile, runs on these cores alone.

    torch's threads inherit it when the first step starts them. Without cores nothing changes. Raises
    ConfigError as `check_cores`.
    """
    check_cores(cores)
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
