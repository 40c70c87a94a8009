"""Pure: what a worker's event loop asks of its torch thread."""

from typing import Protocol

from engine.step import StepPlan, StepResult


class StepRunner(Protocol):
    """Carries out steps; called from one thread only, blocks for the step's duration."""

    def run(self, plan: StepPlan) -> StepResult:
        """Copies blocks, feeds the slices, draws the tokens. Raises no error for a valid plan."""
        ...
