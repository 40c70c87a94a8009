"""Edge: runs sim.yaml under the online controller, and writes the controller's log."""

from pathlib import Path

from planner.control.controlled_simulation import Controlled, simulate_controlled
from planner.control.controller import ControllerRules
from planner.control.log import entry_line, head_line
from planner.control.role_capacity import CapacityOf, bound_capacity
from planner.placements.placement import Slo, WorkerKind
from planner.plan.workers import PlannedWorkers
from planner.simulate.file import SimFile
from planner.simulate.run import setup_of, workload_of
from tandem.errors import ConfigError


def run_controlled(file: SimFile, folder: Path, window_s: float, log: Path) -> Controlled:
    """The workers flip as the controller says. Raises ConfigError, InvalidRequest.

    Workers must be of one kind, since they change roles; the objectives are those of the first class.
    """
    setup = setup_of(file, folder)
    rules = ControllerRules(2, max(2, len(setup.workers)), can_scale=False)
    course = simulate_controlled(
        setup, list(workload_of(file, folder)), rules, _capacity(file, folder, rules.attainment), window_s
    )
    lines = map(entry_line, course.windows, course.decisions)
    try:
        log.write_bytes(b"".join((head_line(rules), *lines)))
    except OSError as error:
        raise ConfigError(f"{log}: can't be written: {error.strerror}") from error
    return course


def _capacity(file: SimFile, folder: Path, attainment: float) -> CapacityOf:
    kinds = {WorkerKind(pool.device, pool.tp, pool.pp) for pool in file.workers}
    if len(kinds) > 1 or len({pool.max_batch for pool in file.workers}) > 1:
        raise ConfigError("workers: the controller flips roles, so all workers must be of one kind")
    first = file.classes[0]
    slo = Slo(first.ttft_s, first.tpot_s, first.longest_gap_s, attainment)
    return bound_capacity(PlannedWorkers(file, folder), kinds.pop(), slo, file.workers[0].max_batch)
