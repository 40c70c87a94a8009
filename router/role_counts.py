"""Pure: how many workers of each role are wanted, and how many there are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from router.worker_load import WorkerLoad
from tandem.worker import Role


@dataclass(frozen=True, slots=True)
class RoleCount:
    """`desired` is None when nobody said; `actual` workers are attached and not draining."""

    role: Role
    desired: int | None
    actual: int


def role_counts(desired: Mapping[Role, int], workers: Iterable[WorkerLoad]) -> tuple[RoleCount, ...]:
    """One for each role that a cluster must have."""
    serving = [worker.role for worker in workers if not worker.reported.draining]
    return tuple(
        RoleCount(role, desired.get(role), serving.count(role)) for role in (Role.PREFILL, Role.DECODE)
    )
