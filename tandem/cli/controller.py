"""Edge: `tandem controller`: changes how many workers play each role, and replays what it decided."""

import argparse
from pathlib import Path

from tandem.cli.plan import replay_log
from tandem.cli.request_arguments import DEFAULT_ADDRESS


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "controller",
        help="control a running cluster",
        description="The online controller (docs/planning.md).",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = verbs.add_parser(
        "run",
        help="decide how many workers play each role, until Ctrl-C",
        description="Runs a controller beside a cluster; of several one acts. `tandem up` carries it out.",
    )
    run.add_argument(
        "-f",
        "--file",
        type=Path,
        required=True,
        metavar="cluster.yaml",
        help="the cluster's; see `controller`",
    )
    run.add_argument(
        "--router",
        action="append",
        metavar="HOST:PORT",
        help=f"gRPC address of a router, once for each (default {DEFAULT_ADDRESS})",
    )
    run.add_argument("--dry-run", action="store_true", help="print what would change, write nothing")
    run.set_defaults(run=run_controller)
    replay = verbs.add_parser(
        "replay",
        help="decide anew on a log",
        description="Exit code 0 when every decision is the logged one, byte for byte, else 1.",
    )
    replay.add_argument("log", type=Path, metavar="LOG", help="what `controller.log` named")
    replay.add_argument(
        "-f", "--file", type=Path, required=True, metavar="plan.yaml", help="what `controller.plan` named"
    )
    replay.set_defaults(run=run_replay)


def run_controller(chosen: argparse.Namespace) -> int:
    """Controls until interrupted. Raises ConfigError, InvalidRequest."""
    from cluster.config_file import load_cluster_config
    from cluster.controller.assembly import control_cluster
    from cluster.interruptible import run_interruptible

    config = load_cluster_config(chosen.file)
    section = config.controller
    config = config.model_copy(
        update={"controller": section.model_copy(update={"dry_run": chosen.dry_run or section.dry_run})}
    )
    return run_interruptible(control_cluster(config, chosen.router or [DEFAULT_ADDRESS], _say))


def run_replay(chosen: argparse.Namespace) -> int:
    """Raises ConfigError, InvalidRequest."""
    from planner.plan.file import PlanFile
    from planner.plan.run import read_problem
    from planner.yaml_document import load_section

    return replay_log(read_problem(load_section(chosen.file, PlanFile), chosen.file.parent), chosen.log)


def _say(line: str) -> None:
    print(line, flush=True)
