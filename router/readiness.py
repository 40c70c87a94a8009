"""Pure: whether this router can serve now, and if not, why (field-notes, pain 8).

Ready means: a prefill and a decode worker of our digest are attached and take legs, their step loops move,
and a hand-off (a real one or a canary) landed within the last three canary intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from router.worker_load import WorkerLoad
from tandem.worker import Role

MAX_STALL_S = 10.0
"""A worker whose step loop has not moved for so long with work waiting does not count."""

INTERVALS = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether requests can be served; `reason` is empty when they can."""

    ready: bool
    reason: str


def takes_legs(load: WorkerLoad, wanted: Role) -> bool:
    """Whether a worker plays that role and is neither draining nor stalled."""
    plays = load.role in (wanted, Role.MIXED)
    return plays and not load.reported.draining and load.reported.stalled_s <= MAX_STALL_S


class Readiness:
    """Remembers the last hand-off that landed."""

    def __init__(self, canary_interval_s: float) -> None:
        self._interval_s = canary_interval_s
        self._last_handoff_s: float | None = None

    def handoff_landed(self, now_s: float) -> None:
        """KV arrived at a decode worker and was verified."""
        self._last_handoff_s = now_s

    def canary_due(self, now_s: float) -> bool:
        """Whether no hand-off landed within the last interval."""
        return self._last_handoff_s is None or now_s - self._last_handoff_s >= self._interval_s

    def verdict(self, workers: Sequence[WorkerLoad], draining: bool, now_s: float) -> Verdict:
        """Ready, or the first thing that is missing."""
        if draining:
            return Verdict(False, "The router drains.")
        for role in (Role.PREFILL, Role.DECODE):
            if not any(takes_legs(worker, role) for worker in workers):
                return Verdict(False, f"No {role.value} worker is attached and able to take requests.")
        if self._last_handoff_s is None:
            return Verdict(False, "No hand-off has succeeded yet.")
        age_s = now_s - self._last_handoff_s
        if age_s > INTERVALS * self._interval_s:
            return Verdict(False, f"The last hand-off succeeded {age_s:.0f} s ago.")
        return Verdict(True, "")
