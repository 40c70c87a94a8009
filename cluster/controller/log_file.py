"""Edge: the controller's log on a disk; what it holds is in planner/control/log.py."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import structlog

from planner.control.controller import ControllerRules, ControllerState, Decision
from planner.control.load_window import LoadWindow
from planner.control.log import entry_line, head_line
from router.rotating_file import RotatingFile
from tandem.errors import ConfigError

log = structlog.get_logger(__name__)

KEPT_FILES = 4


class ControllerLog(Protocol):
    """Where windows and decisions are noted."""

    def begin(self) -> None:
        """Another controller than before goes on, from a state of its own."""
        ...

    async def note(self, window: LoadWindow, decision: Decision, before: ControllerState) -> None:
        """A window was decided on; `before` is the controller's state before it."""
        ...


class NoLog:
    """The log is off."""

    def begin(self) -> None:
        """Nothing to note."""

    async def note(self, window: LoadWindow, decision: Decision, before: ControllerState) -> None:
        """Nothing to note."""


class LogFile:
    """A file that can be replayed from its first line, and so can each that was set aside."""

    def __init__(self, file: RotatingFile, rules: ControllerRules) -> None:
        self._file = file
        self._rules = rules
        self._begun = False

    def begin(self) -> None:
        """The next line begins a controller."""
        self._begun = False

    async def note(self, window: LoadWindow, decision: Decision, before: ControllerState) -> None:
        """Appends the window, off the event loop; a disk that refuses costs lines and no decision."""
        line, head = entry_line(window, decision), head_line(self._rules, before)
        if not self._begun or self._file.would_overfill(line):
            line = head + line
        try:
            await asyncio.to_thread(self._file.append, [line])
        except OSError as error:
            log.warning("the controller's log lost a line", error=str(error))
            self._begun = False
        else:
            self._begun = True


@contextmanager
def open_log(path: Path | None, most_bytes: int, rules: ControllerRules) -> Iterator[ControllerLog]:
    """A log that is open until the block ends; None: off. Raises ConfigError for a bad path."""
    if path is None:
        yield NoLog()
        return
    try:
        file = RotatingFile(path, most_bytes, KEPT_FILES)
    except OSError as error:
        raise ConfigError(f"controller.log: {path} cannot be written: {error.strerror}") from error
    with file:
        yield LogFile(file, rules)
