"""Edge: reads a file of requests: a trace of a known form, or the cluster's own request log."""

import csv
from collections.abc import Sequence
from pathlib import Path

from planner.workloads.request_log import is_request_log, read_request_log
from planner.workloads.traces import TraceRow, check_sorted, read_trace
from tandem.errors import ConfigError, InvalidRequest


def read_trace_file(path: Path, limit: int | None) -> Sequence[TraceRow]:
    """The first `limit` rows.

    Raises ConfigError for a file that cannot be read, InvalidRequest for one without requests, with times
    that descend, or with a bad line, which it names.
    """
    try:
        with path.open(newline="") as file:
            first = file.readline()
            file.seek(0)
            rows = read_request_log(file, limit) if is_request_log(first) else read_trace(file, limit)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise InvalidRequest(f"The trace {path} is empty: at least one request is needed.", "trace")
    check_sorted(rows)
    return rows
