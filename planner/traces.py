"""Pure: reads three formats of request traces, recognised by their first line.

- Azure (microsoft/vidur's processed form): arrived_at (s), num_prefill_tokens, num_decode_tokens
- arXiv summarisation (microsoft/vidur): num_prefill_tokens, num_decode_tokens, ...; no arrival times
- Mooncake: JSON lines with timestamp (ms), input_length, output_length, hash_ids (one a 512-token block)
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
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


def read_trace(lines: Iterable[str], limit: int | None = None) -> tuple[TraceRow, ...]:
    """The first `limit` rows. Raises InvalidRequest that names the line."""
    iterator = iter(lines)
    first = next(iterator, "")
    rows = (
        _json_rows(chain([first], iterator)) if first.lstrip().startswith("{") else _csv_rows(first, iterator)
    )
    return tuple(islice(rows, limit))


def _csv_rows(header: str, lines: Iterable[str]) -> Iterator[TraceRow]:
    columns = next(csv.reader([header]), [])
    for column in ("num_prefill_tokens", "num_decode_tokens"):
        if column not in columns:
            raise InvalidRequest(
                f"The trace's first line has no column {column}; known are Azure's and arXiv's columns, and "
                "Mooncake's JSON lines.",
                "trace",
            )
    timed = "arrived_at" in columns
    for number, row in enumerate(csv.DictReader(lines, fieldnames=columns), start=2):
        yield _row(
            number,
            row.get("arrived_at") if timed else None,
            1.0,
            row["num_prefill_tokens"],
            row["num_decode_tokens"],
            (),
        )


def _json_rows(lines: Iterable[str]) -> Iterator[TraceRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry: dict[str, Any] = json.loads(line)
            yield _row(
                number,
                entry["timestamp"],
                1e-3,
                entry["input_length"],
                entry["output_length"],
                entry.get("hash_ids", ()),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(
                f"Line {number} of the trace is no Mooncake row: {error}.", "trace"
            ) from error


def _row(
    number: int,
    arrived: Any,
    unit_s: float,
    prompt_tokens: Any,
    output_tokens: Any,
    prefix_ids: Iterable[Any],
) -> TraceRow:
    try:
        row = TraceRow(
            None if arrived is None else float(arrived) * unit_s,
            int(prompt_tokens),
            int(output_tokens),
            tuple(int(identity) for identity in prefix_ids),
        )
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"Line {number} of the trace has no valid numbers: {error}.", "trace") from error
    if row.prompt_tokens < 0 or row.output_tokens < 0:
        raise InvalidRequest(f"Line {number} of the trace has negative lengths.", "trace")
    return row
