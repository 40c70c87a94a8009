"""Pure: names one life of a worker."""

from typing import NamedTuple

from tandem.ids import Incarnation, WorkerId


class WorkerKey(NamedTuple):
    """A worker and its incarnation: a restarted worker is another one, with nothing held against it."""

    worker_id: WorkerId
    incarnation: Incarnation
