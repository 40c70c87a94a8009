"""Pure: the controller's log, JSON lines: its rules, then each window with its decision; and its replay."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from planner.controller import Controller, ControllerRules, Decision
from planner.load_window import LoadWindow
from planner.role_capacity import CapacityOf
from tandem.errors import InvalidRequest

MAX_LINE_BYTES = 1 << 20

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class LogHead:
    """The first line."""

    rules: ControllerRules
    kind: Literal["tandem controller"] = "tandem controller"
    version: Literal[1] = 1


@dataclass(frozen=True, slots=True)
class LogEntry:
    """Every other line."""

    window: LoadWindow
    decision: Decision


_HEAD = TypeAdapter(LogHead)
_ENTRY = TypeAdapter(LogEntry)


def head_line(rules: ControllerRules) -> bytes:
    """The first line of a log, newline included."""
    return orjson.dumps(LogHead(rules)) + b"\n"


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
    controller = Controller(_read(_HEAD, 1, first).rules, capacity_of)
    for number, line in numbered:
        entry = _read(_ENTRY, number, line)
        decision = controller.decide(entry.window)
        equal = entry_line(entry.window, decision) == line.rstrip(b"\r\n") + b"\n"
        yield Replayed(number, decision, entry.decision, equal)


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
