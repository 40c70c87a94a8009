"""Edge: what `tandem up` does once its configuration is read."""

import asyncio
import logging
import sys

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.launch import running_cluster
from cluster.terminal import TerminalProgress
from tandem.logs import configure_logging


async def serve_until_interrupted(config: ClusterConfig) -> int:
    """Serves until cancelled, which is the usual end (0), or until the router ends by itself (1)."""
    configure_logging(logging.WARNING)
    console = Console(highlight=False)
    try:
        with TerminalProgress(console) as progress:
            async with running_cluster(config, progress=progress, say=console.print) as cluster:
                progress.stop()
                console.print(f"gRPC  {cluster.grpc_address}")
                console.print(f"HTTP  http://{cluster.http_address}/v1")
                console.print(f"logs  {cluster.run_folder}")
                console.print("Ctrl-C drains and stops.")
                failure = await cluster.until_failure()
        print(f"tandem: {failure}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        return 0
