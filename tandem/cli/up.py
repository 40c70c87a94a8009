"""Edge: `tandem up`: a cluster on this machine until Ctrl-C, which drains."""

import argparse
from pathlib import Path


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "up",
        help="run a cluster",
        description="Starts registry, Ray, workers and router; Ctrl-C drains and stops them.",
    )
    parser.add_argument("-f", "--file", type=Path, metavar="cluster.yaml", help="see docs/cluster-yaml.md")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Serves until interrupted. Raises ConfigError, ModelError, NotReady."""
    from cluster.config_file import load_cluster_config
    from cluster.interruptible import run_interruptible
    from cluster.up import serve_until_interrupted

    return run_interruptible(serve_until_interrupted(load_cluster_config(chosen.file)))
