"""Pure: how long tokens gather before they are sent on, so that a busy router sends fewer, fuller messages.

Sending a message costs many times what a token in it costs. An idle router sends every token at once; the
first token of a request and its last are never held. Under load the hold grows until the router keeps up.
"""

LONGEST_HOLD_S = 0.1
HOLD_STEP_S = 0.005
BUSY_FRACTION = 0.8
IDLE_FRACTION = 0.6
LATE_S = 0.01
STARVED_FRACTION = 0.4
"""A late loop that uses at least this much lacks a core of its own; using less, it has little to gain."""


class Pacer:
    """Adapts the hold to how busy the router's loop is."""

    def __init__(self) -> None:
        self.hold_s = 0.0
        """Seconds for which tokens gather now; 0 for none."""

    def observe(self, busy_fraction: float, late_s: float) -> None:
        """Takes in one period: CPU seconds per second of it, and by how much its timer fired late."""
        starved = late_s > LATE_S and busy_fraction > STARVED_FRACTION
        if busy_fraction > BUSY_FRACTION or starved:
            self.hold_s = min(LONGEST_HOLD_S, self.hold_s + HOLD_STEP_S)
        elif busy_fraction < IDLE_FRACTION:
            self.hold_s = max(0.0, self.hold_s - HOLD_STEP_S / 2)
