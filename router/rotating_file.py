"""Edge: a file that is appended to, and set aside when it is full; for one thread at a time."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType


class RotatingFile:
    """`path` and, of the full ones, `path.1` (the newest) to `path.KEPT`; only we may read them."""

    def __init__(self, path: Path, most_bytes: int, kept: int) -> None:
        """Raises OSError when the file can't be opened."""
        self._path, self._most_bytes, self._kept = path, most_bytes, kept
        self._descriptor, self._bytes = self._opened()

    def append(self, lines: Sequence[bytes]) -> None:
        """Writes whole lines; a line that would overfill the file begins the next one. Raises OSError."""
        together: list[bytes] = []
        for line in lines:
            if self.would_overfill(line):
                self._write(together)
                together = []
                self._rotate()
            together.append(line)
            self._bytes += len(line)
        self._write(together)

    def would_overfill(self, line: bytes) -> bool:
        """Whether this line, appended now, begins another file."""
        return self._bytes > 0 and self._bytes + len(line) > self._most_bytes

    def __enter__(self) -> "RotatingFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def _opened(self) -> tuple[int, int]:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return descriptor, os.fstat(descriptor).st_size

    def _write(self, lines: Sequence[bytes]) -> None:
        left = memoryview(b"".join(lines))
        while left:
            left = left[os.write(self._descriptor, left) :]

    def _rotate(self) -> None:
        for number in range(self._kept - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))
        full = self._descriptor
        self._descriptor, self._bytes = self._opened()
        os.close(full)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
