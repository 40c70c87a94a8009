"""Edge: where one run of a cluster keeps its logs, and the sweeping of old ones."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

RUN_FOLDER_ENV = "TANDEM_RUN_DIR"
KEPT_RUNS = 10


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that only we may read."""

    path: Path

    @staticmethod
    def create() -> "RunFolder":
        """$TANDEM_RUN_DIR, or ~/.cache/tandem/run/PID; of earlier runs the last few are kept."""
        chosen = os.environ.get(RUN_FOLDER_ENV)
        if chosen:
            path = Path(chosen)
        else:
            runs = Path.home() / ".cache" / "tandem" / "run"
            _sweep(runs)
            path = runs / str(os.getpid())
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return RunFolder(path)

    def log(self, component: str) -> Path:
        """Log file of a component."""
        return self.path / f"{component}.log"


def _sweep(runs: Path) -> None:
    """Removes all but the newest folders of processes that ended."""
    if not runs.is_dir():
        return
    ended = [path for path in runs.iterdir() if path.name.isdigit() and not psutil.pid_exists(int(path.name))]
    ended.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in ended[KEPT_RUNS:]:
        shutil.rmtree(path, ignore_errors=True)
