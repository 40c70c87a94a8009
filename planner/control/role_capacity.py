"""Pure: how many requests a second a placement of equal workers can serve, by the analytic bound."""

from collections.abc import Callable

from planner.control.load_window import RolePlacement
from planner.placements.bound import Bounds, Lengths
from planner.placements.placement import Candidate, Mode, Slo, WorkerKind
from planner.placements.space import Workers

Capacity = Callable[[RolePlacement], float]
"""Requests a second, at the lengths of one window."""

CapacityOf = Callable[[tuple[tuple[int, int], ...]], Capacity]
"""The capacities at the given (prompt, output) lengths, of which there is one at least."""


def bound_capacity(workers: Workers, kind: WorkerKind, slo: Slo, max_batch: int) -> CapacityOf:
    """Capacities by the latency model of one kind of worker (planner/placements/bound.py)."""

    def at(lengths: tuple[tuple[int, int], ...]) -> Capacity:
        bounds = Bounds(workers, Lengths(lengths), slo, max_batch)

        def capacity(placed: RolePlacement) -> float:
            candidate = Candidate(Mode.DISAGGREGATED, kind, placed.prefill, kind, placed.decode)
            return bounds.rate_rps(candidate)

        return capacity

    return at
