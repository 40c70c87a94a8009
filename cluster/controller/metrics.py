"""Edge: the controller's own Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from planner.control.controller import Decision


class ControllerMetrics:
    """All metrics of one controller, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._leading = Gauge(
            "tandem_controller_leading", "1 for the one controller that acts.", registry=self.registry
        )
        self._decisions = Counter(
            "tandem_controller_decisions", "Decisions by verdict.", ["verdict"], registry=self.registry
        )
        self._changes = Counter(
            "tandem_controller_changes",
            "Workers flipped, added or removed by decisions that were written.",
            ["action"],
            registry=self.registry,
        )
        self._skipped = Counter(
            "tandem_controller_skipped_windows", "Windows nobody decided on.", registry=self.registry
        )

    def leads(self, leading: bool) -> None:
        """This controller acts, or another one does."""
        self._leading.set(leading)

    def skipped(self) -> None:
        """The cluster was changing, or no router told its load."""
        self._skipped.inc()

    def decided(self, decision: Decision, *, written: bool) -> None:
        """A decision; `written`: its changes are what is wanted now."""
        self._decisions.labels(decision.verdict.name.lower()).inc()
        for action in decision.actions if written else ():
            self._changes.labels(action.kind.name.lower()).inc(action.count)
