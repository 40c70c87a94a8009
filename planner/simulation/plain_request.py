"""Pure: a request on the plain course, on which nothing fails, and what every part counts for it."""

from dataclasses import dataclass

from planner.workloads.workload import SimRequest
from router.timeline import Timeline
from tandem.ids import LegId


class NotPlainError(Exception):
    """Something happened that counting can't follow: the simulation is done with the full objects."""


@dataclass(slots=True, eq=False)
class PlainRequest:
    """`tokens` are those of its prompt, of which `computed` are read. `number` is its place among those at
    its worker; the clocks and steps are its decode worker's.
    """

    asked: SimRequest
    tokens: int
    leg_id: LegId
    timeline: Timeline
    deadline_s: float
    number: int = 0
    computed: int = 0
    passed_by: int = 0
    blocks: int = 0
    offered_s: float = 0.0
    joined_clock: int = 0
    first_step: int = 0
    first_s: float = 0.0
