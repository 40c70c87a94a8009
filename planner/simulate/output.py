"""Edge: what a simulation leaves: JSON, records, timeline, plot."""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from planner.simulation.records import COLUMNS, Records
from planner.simulation.utilisation import Utilisation
from planner.simulator import SimulationResult
from planner.statistics import percentile, wilson_interval
from tandem.errors import ConfigError
from tandem.ids import WorkerId

QUANTILES = (0.5, 0.9, 0.99)


def simulation_json(result: SimulationResult) -> dict[str, Any]:
    """The keys of docs/json-output.md."""
    records, span_s = result.records, result.span_s
    outcomes = records.names("outcome")
    return {
        "requests": len(records),
        "finished": outcomes.count("finished"),
        "span_s": span_s,
        "classes": [_class_json(records, name, span_s) for name in records.classes],
        "workers": [
            {
                "worker_id": worker_id,
                "busy": used.busy_s / span_s if span_s else 0.0,
                "steps": used.steps,
                "prompt_tokens": used.prompt_tokens,
                "output_tokens": used.output_tokens,
            }
            for worker_id, used in result.used.items()
        ],
    }


def _class_json(records: Records, name: str, span_s: float) -> dict[str, Any]:
    good, offered = records.good(name)
    low, high = wilson_interval(good, offered)
    found: dict[str, Any] = {
        "name": name,
        "offered": offered,
        "good": good,
        "attainment": good / offered if offered else 0.0,
        "attainment_low": low,
        "attainment_high": high,
        "goodput_rps": good / span_s if span_s else 0.0,
    }
    for metric in ("ttft_s", "tpot_s", "longest_gap_s"):
        values = sorted(records.times_of(metric, name))
        found[metric] = {
            "mean": sum(values) / len(values) if values else None,
            **{f"p{share * 100:g}": percentile(values, share) if values else None for share in QUANTILES},
        }
    return found


def write_records(records: Records, path: Path) -> None:
    """CSV, or Parquet when the name ends so. Raises ConfigError when it can't be written."""
    if path.suffix == ".parquet":
        _write_parquet(records, path)
        return
    try:
        with path.open("w") as file:
            file.writelines(records.csv_lines())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def write_timeline(used: Mapping[WorkerId, Utilisation], path: Path) -> None:
    """Chrome trace events (chrome://tracing, Perfetto): a row a worker, a box a step or run of steps."""
    events: list[dict[str, Any]] = []
    for row, (worker_id, account) in enumerate(used.items()):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": worker_id}})
        for span in account.spans:
            name = "prefill" if not span.batch else "mixed" if span.prompt_tokens else "decode"
            args = {"prompt_tokens": span.prompt_tokens, "batch": span.batch, "steps": span.steps}
            start_us, took_us = span.start_s * 1e6, span.took_s * 1e6
            events.append(
                {"ph": "X", "name": name, "pid": 0, "tid": row, "ts": start_us, "dur": took_us, "args": args}
            )
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def draw(records: Records, path: Path) -> None:
    """Distributions of TTFT and TPOT by class, with the objectives. Raises ConfigError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; `pip install tandem[plan]` brings it.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("ttft_s", "tpot_s"), strict=True):
        for name, slo in records.classes.items():
            values = sorted(records.times_of(metric, name))
            shares = [(place + 1) / len(values) for place in range(len(values))]
            (line,) = axes.plot(values, shares, label=name)
            limit = slo.ttft_s if metric == "ttft_s" else slo.tpot_s
            axes.axvline(limit, color=line.get_color(), linestyle="--", linewidth=0.8)
        axes.set_xlabel(f"{metric.removesuffix('_s').upper()} (s); dashed: objective")
        axes.set_ylabel("share of requests")
        axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from error


def _write_parquet(records: Records, path: Path) -> None:
    if find_spec("pyarrow") is None:
        raise ConfigError("Parquet needs pyarrow, which is not installed; a name that ends in .csv works.")
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Sequence[object]] = {name: list(records.column(name)) for name in COLUMNS}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
