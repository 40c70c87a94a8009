"""Edge: `tandem simulate`: what a cluster would do with a load, without the cluster."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "simulate",
        help="a what-if",
        description="Simulates a cluster under a load with the objects that serve (docs/simulator.md).",
    )
    parser.add_argument("-f", "--file", type=Path, required=True, metavar="sim.yaml")
    parser.add_argument("--records", type=Path, metavar="FILE", help="one row a request; .csv or .parquet")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="Chrome trace of all steps, JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="TTFT and TPOT distributions")
    parser.add_argument(
        "--controller", type=Path, metavar="FILE", help="let the controller flip roles; write its log, JSONL"
    )
    parser.add_argument(
        "--window", type=float, default=60.0, metavar="S", help="the controller looks every so often (60)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/json-output.md)")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Prints the figures. Raises ConfigError or InvalidRequest, each with what would be needed."""
    from planner.control.replay import changes
    from planner.simulate.controlled import run_controlled
    from planner.simulate.file import SimFile
    from planner.simulate.output import draw, simulation_json, write_records, write_timeline
    from planner.simulate.run import run_file
    from planner.yaml_document import load_section

    file = load_section(chosen.file, SimFile)
    if chosen.controller is not None:
        course = run_controlled(file, chosen.file.parent, chosen.window, chosen.controller)
        print("\n".join(changes(course.decisions)), file=sys.stderr)
        result = course.result
    else:
        result = run_file(file, chosen.file.parent, keep_timeline=chosen.timeline is not None)
    if chosen.records is not None:
        write_records(result.records, chosen.records)
    if chosen.timeline is not None:
        write_timeline(result.used, chosen.timeline)
    if chosen.plot is not None:
        draw(result.records, chosen.plot)
    figures = simulation_json(result)
    if chosen.json:
        print(json.dumps(figures))
    else:
        _print_tables(figures)
    return 0


def _print_tables(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{figures['finished']} of {figures['requests']} requests in {figures['span_s']:.1f} s")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("class", "attainment", "95 % interval", "goodput", "TTFT p50/p90/p99", "TPOT p50/p90/p99"):
        table.add_column(title)
    for one in figures["classes"]:
        table.add_row(
            one["name"],
            f"{one['attainment']:.1%}",
            f"{one['attainment_low']:.1%} - {one['attainment_high']:.1%}",
            f"{one['goodput_rps']:.3g}/s",
            _milliseconds(one["ttft_s"]),
            _milliseconds(one["tpot_s"]),
        )
    console.print(table)
    for worker in figures["workers"]:
        console.print(f"{worker['worker_id']}: busy {worker['busy']:.0%}, {worker['steps']} steps")


def _milliseconds(found: dict[str, float | None]) -> str:
    values = [found[name] for name in ("p50", "p90", "p99")]
    return " / ".join("-" if value is None else f"{value * 1e3:.0f}" for value in values) + " ms"
