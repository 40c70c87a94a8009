"""Edge: the folder where results that are dear to compute are kept for the next process of this machine."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_ENV = "TANDEM_CACHE"
"""Environment variable with the folder; by default ~/.cache/tandem."""

_LOCK_POLL_S = 0.1


def cache_folder() -> Path:
    """The folder, which need not exist yet."""
    named = os.environ.get(CACHE_ENV)
    return Path(named) if named else Path.home() / ".cache" / "tandem"


@contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Holds an exclusive lock on a file, which the system frees if this process dies.

    Raises TimeoutError (an OSError) when another process has it for `timeout_s`, OSError when the file cannot
    be opened.
    """
    deadline = time.monotonic() + timeout_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"Another process has held {path} for {timeout_s:.0f} s.") from None
                time.sleep(_LOCK_POLL_S)
        yield
