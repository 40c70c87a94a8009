"""Pure: the controller over a simulated cluster whose workers flip when it says so.

A flip changes nothing before its time, so the course up to it is simulated once more with it; without a flip
one run is enough.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from planner.control.controller import Action, ActionKind, Controller, ControllerRules, Decision
from planner.control.load_window import LoadWindow, RolePlacement
from planner.control.role_capacity import CapacityOf
from planner.simulation.setup import Fault, FaultKind, Setup, SimRole
from planner.simulator import SimulationResult, simulate
from planner.workloads.workload import SimRequest
from tandem.errors import InvalidRequest
from tandem.ids import WorkerId

MOST_LENGTHS = 256
"""Length pairs of a window that the controller is told, evenly taken."""


@dataclass(frozen=True, slots=True)
class Controlled:
    """The course of a simulation under a controller."""

    result: SimulationResult
    windows: tuple[LoadWindow, ...]
    decisions: tuple[Decision, ...]
    flips: tuple[Fault, ...]


def simulate_controlled(
    setup: Setup,
    requests: Sequence[SimRequest],
    rules: ControllerRules,
    capacity_of: CapacityOf,
    window_s: float,
) -> Controlled:
    """Role flips alone are carried out; the simulated cluster gets no new workers.

    Raises InvalidRequest unless the window is positive and finite, there are requests, and both roles have
    workers.
    """
    roles = {spec.worker_id: spec.role for spec in setup.workers}
    both = set(roles.values()) == {SimRole.PREFILL, SimRole.DECODE}
    if not (0 < window_s < inf and requests and both):
        raise InvalidRequest(
            "A controlled simulation needs a positive window, requests, prefill and decode workers.", "window"
        )
    rules = replace(rules, can_flip=True, can_scale=False)
    controller = Controller(rules, capacity_of)
    watched = replace(setup, keep_timeline=True)
    course = _Course(simulate(watched, requests), requests)
    windows: list[LoadWindow] = []
    decisions: list[Decision] = []
    flips: list[Fault] = []
    for number in range(int(requests[-1].at_s // window_s)):
        windows.append(course.window(roles, number * window_s, (number + 1) * window_s))
        decisions.append(controller.decide(windows[-1]))
        new = _flips(decisions[-1], roles)
        if new:
            flips += new
            faults = (*setup.faults, *flips)
            course = _Course(simulate(replace(watched, faults=faults), requests), requests)
    return Controlled(course.result, tuple(windows), tuple(decisions), tuple(flips))


def _flips(decision: Decision, roles: dict[WorkerId, SimRole]) -> list[Fault]:
    """The flips of a decision; `roles` become those after them."""
    flips = []
    for action in decision.actions:
        for worker_id in _chosen(action, roles):
            flips.append(Fault(decision.at_s, FaultKind.FLIP, worker_id))
            to_prefill = action.kind is ActionKind.FLIP_TO_PREFILL
            roles[worker_id] = SimRole.PREFILL if to_prefill else SimRole.DECODE
    return flips


def _chosen(action: Action, roles: dict[WorkerId, SimRole]) -> list[WorkerId]:
    leaves = SimRole.DECODE if action.kind is ActionKind.FLIP_TO_PREFILL else SimRole.PREFILL
    return sorted(worker_id for worker_id, role in roles.items() if role is leaves)[: action.count]


class _Course:
    """One run, ordered so that a window is looked up and not searched for."""

    def __init__(self, result: SimulationResult, requests: Sequence[SimRequest]) -> None:
        records = result.records
        self.result = result
        self._arrived_s = [request.at_s for request in requests]
        asked = {request.number: request for request in requests}
        met = [missed == "" for missed in records.names("slo_missed_by")]
        order = sorted(range(len(records)), key=records.times["ended_s"].__getitem__)
        self._ended_s = [records.times["ended_s"][row] for row in order]
        self._ended = [(asked[records.numbers[row]], met[row]) for row in order]
        self._starts_s = {
            worker_id: [span.start_s for span in used.spans] for worker_id, used in result.used.items()
        }

    def window(self, roles: dict[WorkerId, SimRole], began_s: float, ended_s: float) -> LoadWindow:
        """What a router would have measured: lengths of requests that ended, counts of those that came."""
        ended = self._ended[bisect_left(self._ended_s, began_s) : bisect_left(self._ended_s, ended_s)]
        pairs = [(request.prompt_tokens, request.output_tokens) for request, _ in ended]
        stride = -(-len(pairs) // MOST_LENGTHS) or 1
        return LoadWindow(
            began_s,
            ended_s,
            bisect_left(self._arrived_s, ended_s) - bisect_left(self._arrived_s, began_s),
            tuple(pairs[::stride]),
            sum(met for _, met in ended) / len(ended) if ended else None,
            self._busy(roles, SimRole.PREFILL, began_s, ended_s),
            self._busy(roles, SimRole.DECODE, began_s, ended_s),
            RolePlacement(
                sum(role is SimRole.PREFILL for role in roles.values()),
                sum(role is SimRole.DECODE for role in roles.values()),
            ),
        )

    def _busy(self, roles: dict[WorkerId, SimRole], role: SimRole, began_s: float, ended_s: float) -> float:
        """Busy share of the workers of a role, flipped ones counted where they are now."""
        workers = [worker_id for worker_id, played in roles.items() if played is role]
        busy_s = 0.0
        for worker_id in workers:
            starts_s = self._starts_s[worker_id]
            # The step before the first that starts here may still be running.
            first = max(0, bisect_left(starts_s, began_s) - 1)
            for span in self.result.used[worker_id].spans[first : bisect_left(starts_s, ended_s)]:
                end_s = min(ended_s, span.start_s + span.took_s)
                busy_s += max(0.0, end_s - max(began_s, span.start_s))
        return busy_s / (len(workers) * (ended_s - began_s))
