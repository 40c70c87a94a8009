"""Pure: the next step from the workers that run to those that are wanted; one worker stops at a time.

A flip is a worker that ends and one of the other role that begins in its place. No role loses its last worker
that serves, and nobody stops while a started worker does not serve yet: the others carry its load.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tandem.ids import WorkerId
from tandem.worker import Role

Roles = Mapping[WorkerId, Role]


@dataclass(frozen=True, slots=True)
class Step:
    """Stop a worker, start one, or both: then the second begins on the resources of the first."""

    stop: WorkerId | None = None
    start: WorkerId | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """Who serves, who was started a moment ago and does not serve yet, and for whom there was no room."""

    serving: Collection[WorkerId]
    starting: Collection[WorkerId] = ()
    refused: Collection[WorkerId] = ()


def next_step(wanted: Roles, running: Roles, health: Health, *, interchangeable: bool) -> Step | None:
    """None when all is as wanted, or nothing may be done now. Both mappings are in the order of starting.

    `interchangeable`: a worker of one role can run on the resources of one of the other.
    """
    missing = [worker_id for worker_id in wanted if worker_id not in running]
    surplus = [worker_id for worker_id in reversed(list(running)) if worker_id not in wanted]
    stoppable = [] if health.starting else [one for one in surplus if _spared(one, running, health)]
    flips = min(len(missing), len(surplus)) if interchangeable else 0
    if flips and stoppable:
        return Step(stop=stoppable[0], start=missing[0])
    for worker_id in missing[flips:]:
        if worker_id not in health.refused:
            return Step(start=worker_id)
    if stoppable and not flips:
        return Step(stop=stoppable[0])
    return None


def _spared(worker_id: WorkerId, running: Roles, health: Health) -> bool:
    """Whether another worker of its role serves."""
    return any(
        other != worker_id and role is running[worker_id] and other in health.serving
        for other, role in running.items()
    )
