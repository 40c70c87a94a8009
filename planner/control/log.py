"""Pure: the controller's log, JSON lines: its rules, then each window with its decision; and its replay.

A controller that goes on where another one ended, or begins a new file, says its rules and its state anew.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from planner.control.controller import Controller, ControllerRules, ControllerState, Decision
from planner.control.load_window import LoadWindow
from planner.control.role_capacity import CapacityOf
from tandem.errors import InvalidRequest

MAX_LINE_BYTES = 1 << 20

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class LogHead:
    """The first line, and one wherever a controller begins."""

    rules: ControllerRules
    state: ControllerState | None = None
    kind: Literal["tandem controller"] = "tandem controller"
    version: Literal[1] = 1


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A line for a window."""

    window: LoadWindow
    decision: Decision


_HEAD = TypeAdapter(LogHead)
_LINE: TypeAdapter[LogHead | LogEntry] = TypeAdapter(LogHead | LogEntry)


def head_line(rules: ControllerRules, state: ControllerState | None = None) -> bytes:
    """A line that begins a log, or a controller in it; newline included."""
    return orjson.dumps(LogHead(rules, state)) + b"\n"


def entry_line(window: LoadWindow, decision: Decision) -> bytes:
    """A line for a window, newline included; equal for equal values."""
    return orjson.dumps(LogEntry(window, decision)) + b"\n"


@dataclass(frozen=True, slots=True)
class Replayed:
    """A line of a log, what the controller decides on its window now, and whether the bytes are equal."""

    number: int
    decision: Decision
    logged: Decision
    equal: bool


def replay(lines: Iterable[bytes], capacity_of: CapacityOf) -> Iterator[Replayed]:
    """Decides anew on every window. Raises InvalidRequest that names the line that can't be read."""
    numbered = enumerate(lines, start=1)
    _, first = next(numbered, (1, b""))
    controller = _begun(_read(_HEAD, 1, first), capacity_of)
    for number, line in numbered:
        entry = _read(_LINE, number, line)
        if isinstance(entry, LogHead):
            controller = _begun(entry, capacity_of)
            continue
        decision = controller.decide(entry.window)
        equal = entry_line(entry.window, decision) == line.rstrip(b"\r\n") + b"\n"
        yield Replayed(number, decision, entry.decision, equal)


def _begun(head: LogHead, capacity_of: CapacityOf) -> Controller:
    return Controller(head.rules, capacity_of, head.state)


def _read(kind: TypeAdapter[Value], number: int, line: bytes) -> Value:
    try:
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
        return kind.validate_json(line)
    except (ValidationError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidRequest(
            f"Line {number} of the controller's log can't be read: {reason}.", "replay"
        ) from error
