"""Pure: the cluster's request log: one JSON line for each request that ended; docs/simulator.md.

Keys: arrival_s, prompt_tokens, output_tokens, slo_class, outcome, ttft_s, tpot_s. Lines are in order of the
requests' ends.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from planner.workloads.traces import TraceRow, trace_row
from tandem.errors import InvalidRequest


def is_request_log(first_line: str) -> bool:
    """Whether a file that begins so is a request log."""
    return first_line.lstrip().startswith("{") and '"arrival_s"' in first_line


def read_request_log(lines: Iterable[str], limit: int | None) -> Sequence[TraceRow]:
    """The first `limit` rows, in order of arrival. Raises InvalidRequest that names the line."""
    rows = [_row(number, line) for number, line in enumerate(islice(lines, limit), start=1) if line.strip()]
    return sorted(rows, key=lambda row: row.arrived_s or 0.0)


def _row(number: int, line: str) -> TraceRow:
    try:
        entry: dict[str, Any] = json.loads(line)
        arrived_s = float(entry["arrival_s"])
        return trace_row(number, arrived_s, entry["prompt_tokens"], entry["output_tokens"], ())
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"Line {number} of the request log is none: {error}.", "trace") from error
