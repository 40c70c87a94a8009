"""Pure: what happens next: a queue of events and the virtual clock that it moves."""

import heapq
from collections.abc import Callable
from typing import Any

STEP_END = 0
"""Kind of an event. At the same instant steps end first, then news is heard, then steps begin."""
NEWS = 1
STEP_BEGIN = 2


class EventQueue:
    """Events in order of time, then of kind, then of their making; deterministic.

    Floats in seconds. `now_s` is the time of the event that runs.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, int, Callable[[Any], None], Any]] = []
        self._made = 0

    def at(self, time_s: float, kind: int, action: Callable[[Any], None], subject: Any) -> None:
        """Calls `action(subject)` at a time, now if it is past."""
        self._made += 1
        if time_s < self.now_s:
            time_s = self.now_s
        heapq.heappush(self._heap, (time_s, kind, self._made, action, subject))

    def run(self) -> None:
        """Runs until nothing is left to happen."""
        heap, pop = self._heap, heapq.heappop
        while heap:
            self.now_s, _, _, action, subject = pop(heap)
            action(subject)
