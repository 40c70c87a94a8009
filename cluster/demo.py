"""Edge: what `tandem demo` does: a cluster on free ports, one answer, its timeline."""

import logging
import time

from rich.console import Console

from cluster.config import ClusterConfig, RouterSection
from cluster.launch import RunningCluster, running_cluster
from cluster.terminal import TerminalProgress
from tandem.cli.timeline_table import print_timeline
from tandem.client import AsyncTandemClient, GenerateOptions
from tandem.errors import TandemError
from tandem.generation import ChatMessage, SamplingOptions, Update
from tandem.logs import configure_logging


async def show_one_answer(question: str, max_tokens: int) -> int:
    """Prints the answer as it comes, then the stages; everything is stopped when it returns."""
    configure_logging(logging.WARNING)
    console = Console(highlight=False)
    started_s = time.monotonic()
    config = ClusterConfig(router=RouterSection(grpc_port=0, http_port=0))
    with TerminalProgress(console) as progress:
        async with running_cluster(config, progress=progress) as cluster:
            progress.stop()
            up_s = time.monotonic() - started_s
            console.print(f"up after {up_s:.1f} s, logs in {cluster.run_folder}\n")
            console.print(question, style="bold", markup=False)
            last = await _stream(console, cluster, question, max_tokens)
            console.print()
            print_timeline(last, console)
    console.print(f"\nall stopped after {time.monotonic() - started_s:.1f} s")
    return 0


async def _stream(console: Console, cluster: RunningCluster, question: str, max_tokens: int) -> Update:
    options = GenerateOptions(sampling=SamplingOptions(max_tokens=max_tokens, temperature=0.0))
    last: Update | None = None
    async with AsyncTandemClient(cluster.grpc_address) as client:
        async for update in client.generate([ChatMessage("user", question)], options):
            for delta in update.deltas:
                console.out(delta.text, end="")
            last = update
    console.print()
    if last is None or last.timeline is None:
        raise TandemError("The answer ended without its timeline.")
    return last
