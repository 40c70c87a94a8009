"""Edge: shows a launch in a terminal: a bar for each part; plain lines where there is no terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from cluster.progress import LaunchProgress, Phase
from tandem.ids import WorkerId

_TITLES = {
    Phase.REGISTRY: "registry (Valkey)",
    Phase.MODEL: "model",
    Phase.RAY: "Ray",
    Phase.ROUTER: "router",
    Phase.WORKERS: "workers",
    Phase.PROOF: "first hand-off",
}


class TerminalProgress(LaunchProgress):
    """Use as `with`; the bars stay on the screen, finished, when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[Phase, TaskID] = {}
        self._bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves the bars as they are and gives the terminal back; idempotent."""
        self._bars.stop()

    def began(self, phase: Phase) -> None:
        """Adds a bar that pulses."""
        self._tasks[phase] = self._bars.add_task(_TITLES[phase], total=None, note="")

    def ended(self, phase: Phase, seconds: float) -> None:
        """Fills the bar."""
        self._bars.update(self._tasks[phase], total=1.0, completed=1.0)
        if not self._console.is_terminal:
            self._console.print(f"{_TITLES[phase]}: {seconds:.1f} s", highlight=False)

    def model_bytes(self, done_bytes: int, total_bytes: int) -> None:
        """Moves the model's bar."""
        note = f"converting, {total_bytes / 1e6:.0f} MB, first time only"
        self._bars.update(self._tasks[Phase.MODEL], total=total_bytes, completed=done_bytes, note=note)

    def worker_registered(self, worker_id: WorkerId) -> None:
        """Names the worker beside the bar."""
        task = self._tasks[Phase.WORKERS]
        before = next(bar.fields["note"] for bar in self._bars.tasks if bar.id == task)
        self._bars.update(task, note=f"{before} {worker_id}".strip())
