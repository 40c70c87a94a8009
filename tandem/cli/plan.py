"""Edge: `tandem plan`: which workers on which hardware give the most goodput, and whether to disaggregate."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.placements.search import Progress
    from planner.plan.result import PlanResult
    from planner.plan.run import Problem

UNCUT_COLUMNS = 250


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "plan",
        help="find a placement",
        description="Searches placements by simulation: how many workers of which role on which devices.",
    )
    parser.add_argument(
        "-f", "--file", type=Path, required=True, metavar="plan.yaml", help="see docs/planning.md"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="cluster.yaml", help="write it for `tandem up`")
    parser.add_argument("--plot", type=Path, metavar="plan.png", help="draw attainment by rate and SLO scale")
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/json-output.md)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="candidates to list")
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="instead of planning, decide anew on a controller's log"
    )
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Prints the plan. Raises ConfigError, InvalidRequest, each with what would be needed."""
    import json

    from planner.plan.curves import plan_lines
    from planner.plan.file import PlanFile
    from planner.plan.output import write_cluster_yaml
    from planner.plan.plot import draw
    from planner.plan.processes import PlanProcesses
    from planner.plan.result import plan_json
    from planner.plan.run import make_plan, read_problem
    from planner.yaml_document import load_section

    plan = load_section(chosen.file, PlanFile)
    problem = read_problem(plan, chosen.file.parent)
    if chosen.replay is not None:
        return replay_log(problem, chosen.replay)
    with PlanProcesses(plan, chosen.file.parent) as processes:
        with _progress() as progress:
            result = make_plan(problem, processes.find_many, progress)
        if chosen.plot is not None:
            draw(plan_lines(result, processes.attainments), plan.slo.attainment, chosen.plot)
    if chosen.json:
        print(json.dumps(plan_json(result)))
    else:
        _print_tables(result, chosen.top)
    if chosen.output is not None:
        write_cluster_yaml(problem, result.mix, chosen.output)
    return 0


def replay_log(problem: "Problem", log: Path) -> int:
    """Decides anew on a controller's log with the workers of a plan.

    Exit code 0 when every decision is the logged one, byte for byte, else 1.
    """
    from planner.control.replay import plan_capacity, replay_file

    replayed = replay_file(log, plan_capacity(problem))
    print("\n".join(replayed.lines()))
    return 0 if replayed.equal else 1


@contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar on the terminal's error stream; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("candidates"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("candidates", total=None)
        yield lambda settled, total: bar.update(task, completed=settled, total=total)


def _print_tables(result: "PlanResult", top: int) -> None:
    from rich.console import Console
    from rich.table import Table

    # Without a terminal nothing is cut: the reader is a file or another program.
    width = None if sys.stdout.isatty() else UNCUT_COLUMNS
    console = Console(highlight=False, width=width)
    console.print(f"{result.mix.rate_rps:.3g} req/s for {result.mix.cost:g} an hour:")
    for candidate, count in result.mix.counts:
        console.print(f"  {count} of: {candidate}")
    console.print(result.advice)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("rank", "candidate", "req/s", "req/s a device", "price", "held back by"):
        table.add_column(title, no_wrap=True)
    for rank, one in enumerate(result.ranked[:top], start=1):
        table.add_row(
            str(rank),
            str(one.candidate),
            f"{one.rate_rps:.3g}",
            f"{one.per_device_rps:.3g}",
            f"{one.cost:g}",
            one.why,
        )
    console.print(table)
    console.print(
        f"{result.candidates} candidates, {result.hopeless} miss an objective even idle, "
        f"{result.simulated} simulated"
    )
    for caution in result.cautions:
        console.print(f"caution: {caution}")
