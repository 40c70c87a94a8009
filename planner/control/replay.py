"""Edge: replays a controller's log with the workers of a plan, and says what each decision would change."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from planner.control.controller import Decision, diff
from planner.control.log import Replayed, replay
from planner.control.role_capacity import CapacityOf, bound_capacity
from planner.placements.placement import WorkerKind
from planner.plan.run import Problem
from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ReplayedLog:
    """All windows of a log, decided anew."""

    entries: tuple[Replayed, ...]

    @property
    def equal(self) -> bool:
        """Whether every decision is the logged one, byte for byte."""
        return all(entry.equal for entry in self.entries)

    def lines(self) -> list[str]:
        """The changes, the differences from the log, and a count."""
        shown = [
            f"line {entry.number}: {diff(entry.decision)}"
            + ("" if entry.equal else f"; the log says: {diff(entry.logged)}")
            for entry in self.entries
            if entry.decision.changed or not entry.equal
        ]
        other = sum(not entry.equal for entry in self.entries)
        return [*shown, f"{len(self.entries)} windows, {other} decided otherwise than logged"]


def plan_capacity(problem: Problem) -> CapacityOf:
    """The capacities of the plan's first hardware, one device a worker. Raises ConfigError without times."""
    kind = WorkerKind(problem.plan.hardware[0].device)
    if problem.workers.latency(kind) is None:
        raise ConfigError(f"controller: there are no step times for {kind}")
    return bound_capacity(problem.workers, kind, problem.slo, problem.plan.max_batch)


def replay_file(path: Path, capacity_of: CapacityOf) -> ReplayedLog:
    """Raises ConfigError when the file can't be read, InvalidRequest when it is no log."""
    try:
        with path.open("rb") as file:
            return ReplayedLog(tuple(replay(file, capacity_of)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def changes(decisions: Iterable[Decision]) -> list[str]:
    """The changes among decisions with their times, and how many windows there were."""
    known = list(decisions)
    shown = [f"{decision.at_s:g} s: {diff(decision)}" for decision in known if decision.changed]
    return [*shown, f"{len(known)} windows, {len(shown)} changes"]
