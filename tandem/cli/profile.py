"""Edge: `tandem profile`: measures this hardware into a file that the planner reads."""

import argparse
import os
from pathlib import Path


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command and its arguments."""
    parser = commands.add_parser(
        "profile",
        help="measure this hardware for the planner",
        description="Measures steps over a grid of sizes, and hand-offs; takes about a minute.",
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, a GGUF file or a Hugging Face folder")
    parser.add_argument("--dtype", default="float32", help="as in cluster.yaml (float32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="(all cores)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="the median is reported (3)")
    parser.add_argument("--quick", action="store_true", help="a few small sizes only")
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of standard output")
    parser.set_defaults(run=_run)


def _run(chosen: argparse.Namespace) -> int:
    from benchmarks.engine_profile import run

    return run(chosen)
