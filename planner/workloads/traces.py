"""Pure: reads four formats of request traces, recognised by their first line.

- Azure (Azure/AzurePublicDataset, 2023 and 2024): TIMESTAMP, ContextTokens, GeneratedTokens
- Azure (microsoft/vidur's processed form): arrived_at (s), num_prefill_tokens, num_decode_tokens
- arXiv summarisation (microsoft/vidur): num_prefill_tokens, num_decode_tokens, ...; no arrival times
- Mooncake: JSON lines with timestamp (ms), input_length, output_length, hash_ids (one a 512-token block)
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, islice, pairwise
from typing import Any

from tandem.errors import InvalidRequest

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace.

    `arrived_s` counts from the trace's start, None when the trace has no times. Equal `prefix_ids` mean equal
    prompt blocks of MOONCAKE_BLOCK_TOKENS tokens; empty when the trace has none.
    """

    arrived_s: float | None
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CsvForm:
    """The names of a form's columns; `dated` times are dates, not seconds since the trace began."""

    arrived: str
    prompt: str
    output: str
    dated: bool


CSV_FORMS = (
    CsvForm("arrived_at", "num_prefill_tokens", "num_decode_tokens", dated=False),
    CsvForm("TIMESTAMP", "ContextTokens", "GeneratedTokens", dated=True),
)


def read_trace(lines: Iterable[str], limit: int | None = None) -> tuple[TraceRow, ...]:
    """The first `limit` rows. Raises InvalidRequest that names the line."""
    iterator = iter(lines)
    first = next(iterator, "")
    rows = (
        _json_rows(chain([first], iterator)) if first.lstrip().startswith("{") else _csv_rows(first, iterator)
    )
    return tuple(islice(rows, limit))


def check_sorted(rows: Sequence[TraceRow]) -> None:
    """Raises InvalidRequest when a request comes before the one above it; rows without times are passed."""
    times_s = [(number, row.arrived_s) for number, row in enumerate(rows, 1) if row.arrived_s is not None]
    for (_, before), (number, after) in pairwise(times_s):
        if after < before:
            raise InvalidRequest(
                f"The trace is not sorted: request {number} comes at {after:g} s, after one at {before:g} s.",
                "trace",
            )


def _csv_rows(header: str, lines: Iterable[str]) -> Iterator[TraceRow]:
    columns = next(csv.reader([header]), [])
    if not columns:
        raise InvalidRequest("The trace is empty; its first line must name the columns.", "trace")
    form = next((form for form in CSV_FORMS if {form.prompt, form.output} <= set(columns)), None)
    if form is None:
        known = "; ".join(f"{form.arrived}, {form.prompt}, {form.output}" for form in CSV_FORMS)
        raise InvalidRequest(
            f"The trace's first line has not the columns of a known form: {known}; or Mooncake's JSON lines.",
            "trace",
        )
    timed = form.arrived in columns
    began_s: float | None = None
    for number, row in enumerate(csv.DictReader(lines, fieldnames=columns), start=2):
        arrived_s = _seconds(number, row[form.arrived], form) if timed else None
        if form.dated and arrived_s is not None:
            began_s = arrived_s if began_s is None else began_s
            arrived_s -= began_s
        yield trace_row(number, arrived_s, row[form.prompt], row[form.output], ())


def _seconds(number: int, text: str | None, form: CsvForm) -> float:
    try:
        return _date_s(text or "") if form.dated else float(text or "")
    except ValueError as error:
        raise InvalidRequest(f"Line {number} of the trace has no valid time: {error}.", "trace") from error


def _date_s(text: str) -> float:
    """Dates without a zone are UTC, so that a change of the clocks moves no arrival."""
    date = datetime.fromisoformat(text)
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _json_rows(lines: Iterable[str]) -> Iterator[TraceRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry: dict[str, Any] = json.loads(line)
            yield trace_row(
                number,
                float(entry["timestamp"]) * 1e-3,
                entry["input_length"],
                entry["output_length"],
                entry.get("hash_ids", ()),
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InvalidRequest(
                f"Line {number} of the trace is no Mooncake row: {error}.", "trace"
            ) from error


def trace_row(
    number: int,
    arrived_s: float | None,
    prompt_tokens: Any,
    output_tokens: Any,
    prefix_ids: Iterable[Any],
) -> TraceRow:
    """A row as a file has it. Raises InvalidRequest, naming its line, for what is no time or no length."""
    try:
        row = TraceRow(
            arrived_s,
            int(prompt_tokens),
            int(output_tokens),
            tuple(int(identity) for identity in prefix_ids),
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"Line {number} of the trace has no valid numbers: {error}.", "trace") from error
    if row.arrived_s is not None and not math.isfinite(row.arrived_s):
        raise InvalidRequest(f"Line {number} of the trace has no valid time: {row.arrived_s}.", "trace")
    if row.prompt_tokens < 0 or row.output_tokens < 0:
        raise InvalidRequest(f"Line {number} of the trace has negative lengths.", "trace")
    return row
