"""Pure: what a worker's event loop asks of its torch thread."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from engine.step import StepPlan, StepResult

LayerListener = Callable[[int], object]
"""Told `layers`: KV of layers [0, layers) of all tokens of the step is in the cache, and may be read."""


class StepRunner(Protocol):
    """Carries out steps; called from one thread only, blocks for the step's duration."""

    def run(self, plan: StepPlan, on_layers: LayerListener | None = None) -> StepResult:
        """Copies blocks, feeds the slices, draws the tokens. Raises no error for a valid plan.

        `on_layers` is called with growing numbers before `run` returns, from whichever thread knows first
        (one that waits for a device's events, say); it may skip numbers, is quick and raises nothing.
        """
        ...


class StepInFlight(Protocol):
    """A step that was begun."""

    def result(self) -> StepResult:
        """Waits for it; to be called once, from the thread that began it and in the order of the steps."""
        ...


@runtime_checkable
class PipelinedRunner(StepRunner, Protocol):
    """A runner that begins a step while the one before is still computed, as a GPU does."""

    def begin(self, plan: StepPlan, on_layers: LayerListener | None = None) -> StepInFlight:
        """Begins a step; one more may be begun before its result is taken.

        Slices of the second may follow the first: their tokens are what it draws. Else as `run`.
        """
        ...
