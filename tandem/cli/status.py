"""Edge: `tandem status`: workers, load, and goodput of each class."""

import argparse
import sys
from typing import TYPE_CHECKING

from tandem.cli.request_arguments import add_address

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.v1 import cluster_pb2

UNCUT_COLUMNS = 250


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "status", help="workers, load, goodput", description="Asks a running cluster."
    )
    add_address(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/json-output.md)")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Exit code 0 when the cluster is ready, 1 when it is not. Raises TandemError."""
    import json

    from tandem.cli.json_output import status_json
    from tandem.client import TandemClient

    with TandemClient(chosen.address) as client:
        status = client.status()
    if chosen.json:
        print(json.dumps(status_json(status)))
    else:
        from rich.console import Console

        # Without a terminal nothing is cut: the reader is a file or another program.
        width = None if sys.stdout.isatty() else UNCUT_COLUMNS
        _print_tables(Console(highlight=False, width=width), status)
    return 0 if status.ready else 1


def _print_tables(console: "Console", status: "cluster_pb2.StatusResponse") -> None:
    from rich.table import Table

    from tandem.wire import ROLE_FROM_WIRE

    state = "ready" if status.ready else f"not ready: {status.not_ready_reason}"
    waiting = f"{status.queued_requests} queued, {status.active_requests} active"
    console.print(f"{status.model}: {state}; {waiting}")
    console.print("; ".join(map(_role_line, status.roles)))
    workers = Table(box=None, padding=(0, 2, 0, 0))
    for title in (
        "worker",
        "role",
        "life",
        "address",
        "metrics",
        "state",
        "running",
        "waiting",
        "blocks used",
    ):
        workers.add_column(title, no_wrap=True)
    for worker in status.workers:
        load = worker.load
        role = ROLE_FROM_WIRE.get(worker.role)
        condition = "draining" if load.draining else "attached" if worker.attached else "not attached"
        workers.add_row(
            worker.worker.worker_id,
            "?" if role is None else role.value,
            str(worker.worker.incarnation),
            worker.worker.address,
            worker.metrics_address or "-",
            condition,
            str(load.running_sequences),
            str(load.waiting_legs),
            f"{load.allocated_blocks}/{load.total_blocks}",
        )
    console.print(workers)
    classes = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("class", "TTFT s", "TPOT s", "gap s", "offered", "good", "goodput/s"):
        classes.add_column(title, justify="left" if title == "class" else "right")
    for entry in status.slo_classes:
        classes.add_row(
            entry.name,
            f"{entry.ttft_s:g}",
            f"{entry.tpot_s:g}",
            f"{entry.longest_gap_s:g}",
            str(entry.offered),
            str(entry.good),
            f"{entry.goodput_rps:.2f}",
        )
    console.print(classes)


def _role_line(count: "cluster_pb2.RoleStatus") -> str:
    from tandem.wire import ROLE_FROM_WIRE

    wanted = f" of {count.desired} wanted" if count.HasField("desired") else ""
    return f"{ROLE_FROM_WIRE[count.role].value}: {count.actual}{wanted}"
