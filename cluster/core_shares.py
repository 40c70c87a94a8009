"""Pure: which of a pool's cores each of its workers keeps to."""

from collections.abc import Sequence


def cores_of(cores: Sequence[int] | None, replicas: int, index: int) -> tuple[int, ...]:
    """Equal shares in the order that the file gives them; empty for any core."""
    share = len(cores or ()) // replicas
    return tuple((cores or ())[index * share : (index + 1) * share])


def cores_fault(cores: Sequence[int] | None, replicas: int, threads: int | str) -> str | None:
    """What is wrong with a pool's cores, and what is allowed; None when nothing is."""
    if cores is None:
        return None
    if len(set(cores)) < len(cores):
        return "cores: names a core twice; allowed: each once"
    if len(cores) % replicas:
        return f"cores: {len(cores)} for {replicas} workers; allowed: a multiple of {replicas}"
    share = len(cores) // replicas
    if isinstance(threads, int) and threads > share:
        return f"threads: {threads} on {share} of the cores; allowed: auto, 1 to {share}"
    return None
