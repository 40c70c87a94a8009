"""Edge: the arguments of `tandem bench ...`; light, so that `tandem --help` is."""

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tandem.errors import InvalidRequest

ARENA_FOLDER: Final = "/dev/shm"  # noqa: S108 - shared memory is what is wanted
"""A tmpfs on every Linux."""


def check_positive(options: Mapping[str, float | None]) -> None:
    """Raises InvalidRequest, naming the option, unless a number is positive and finite; None: not given."""
    for name, number in options.items():
        if number is not None and not 0 < number < math.inf:
            raise InvalidRequest(f"{name} must be positive and finite, not {number}.", name)


def check_writable(files: Mapping[str, Path | None]) -> None:
    """Raises InvalidRequest, naming the option, unless each file can be written, before minutes are spent."""
    for name, path in files.items():
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise InvalidRequest(f"{name} {path}: {path.parent} is no folder that can be written to.", name)


def add_serve(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`tandem bench serve`."""
    parser = kinds.add_parser(
        "serve", help="a load against a running cluster", description="Offers a load, open loop, and counts."
    )
    parser.add_argument("--address", default="localhost:50051", metavar="HOST:PORT", help="gRPC address")
    parser.add_argument("--http-address", default="localhost:8000", metavar="HOST:PORT")
    parser.add_argument("--api", choices=("grpc", "http"), default="grpc", help="which one is driven")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="Azure, arXiv or Mooncake format, or a request log"
    )
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="requests (100)")
    parser.add_argument("--arrivals", choices=("poisson", "gamma", "fixed"), default="poisson")
    parser.add_argument("--rate", type=float, metavar="RPS", help="mean requests a second")
    parser.add_argument("--variation", type=float, default=1.0, metavar="CV", help="of Gamma gaps")
    parser.add_argument("--length-scale", type=float, default=1.0, metavar="X", help="multiplies all lengths")
    parser.add_argument("--max-prompt-tokens", type=int, metavar="N", help="longer prompts are cut")
    parser.add_argument("--max-output-tokens", type=int, default=256, metavar="N", help="cut to it (256)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="without a trace (128)")
    parser.add_argument("--output-tokens", type=int, default=32, metavar="N", help="without a trace (32)")
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="SLO class and its share of the requests; repeatable",
    )
    parser.add_argument(
        "--slo",
        action="append",
        default=[],
        metavar="NAME=TTFT,TPOT,GAP",
        help="objectives in seconds; by default the cluster's own",
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="bound of one request"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/json-output.md)")
    parser.set_defaults(run=_run_serve)


def add_router(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`tandem bench router`."""
    parser = kinds.add_parser(
        "router",
        help="one router process on one core, between stub workers and a load",
        description="Measures tokens/s relayed, and the time to first token that the router adds.",
    )
    parser.add_argument("--streams", type=int, default=256, metavar="N", help="streams at once (256)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="length of a run (5)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="the median is reported (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/json-output.md)")
    parser.set_defaults(run=_run_router)


def add_kv(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`tandem bench kv`."""
    parser = kinds.add_parser(
        "kv",
        help="KV between two processes over every transport",
        description="Measures GB/s beside memcpy and loopback TCP, and the parts of hand-offs under load.",
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="the median is reported (7)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and hand-offs")
    parser.add_argument(
        "--arena-folder", default=ARENA_FOLDER, help="where an arena is made: a tmpfs, or a hugetlbfs"
    )
    parser.add_argument(
        "--codec",
        choices=("identity", "fp8", "int8"),
        default="identity",
        help="how KV is written in the hand-over that overlaps its prefill (identity)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/json-output.md)")
    parser.set_defaults(run=_run_kv)


def _run_kv(chosen: argparse.Namespace) -> int:
    from benchmarks.kv import run

    return run(chosen)


def _add_live(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--live", action="store_true", help="a forecast against a cluster on this machine")
    group.add_argument(
        "--rates",
        type=_positive_numbers,
        metavar="R,R,R",
        help="requests a second (by default 0.25, 0.35 and 0.45 of what the pair can do)",
    )
    group.add_argument(
        "--length-scale", type=float, default=0.05, metavar="X", help="multiplies all lengths (0.05)"
    )
    group.add_argument(
        "--slo",
        type=_positive_numbers,
        default=(0.5, 0.1, 1.0),
        metavar="TTFT,TPOT,GAP",
        help="objectives in seconds (0.5,0.1,1)",
    )
    group.add_argument("--page", type=Path, metavar="FILE", help="write a page for docs/measurements")
    group.add_argument("--profile", type=Path, metavar="FILE", help="keep the profile, JSON")


def _positive_numbers(text: str) -> tuple[float, ...]:
    """Three of them, divided by commas."""
    numbers = tuple(float(part) for part in text.split(","))
    if len(numbers) != 3 or not all(0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: three positive numbers are needed")
    return numbers


def add_sim(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`tandem bench sim`."""
    parser = kinds.add_parser(
        "sim",
        help="how fast the simulator is, or how true its forecast",
        description="Simulates eight disaggregated workers on one core, and reports requests a second; with "
        "--live starts a cluster, and compares what is forecast for it with what it does.",
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="by default lengths like Azure's are drawn"
    )
    parser.add_argument("--requests", type=int, metavar="N", help="a run (19366; 300 with --live)")
    parser.add_argument("--rate", type=float, default=8.0, metavar="RPS", help="requests a second (8)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="the median is reported (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/json-output.md)")
    _add_live(parser.add_argument_group("with --live"))
    parser.set_defaults(run=_run_sim)


def _run_serve(chosen: argparse.Namespace) -> int:
    from benchmarks.serve import run

    return run(chosen)


def _run_router(chosen: argparse.Namespace) -> int:
    from benchmarks.router_relay import run

    return run(chosen)


def _run_sim(chosen: argparse.Namespace) -> int:
    if chosen.live:
        from benchmarks.forecast import run as run_live

        return run_live(chosen)
    from benchmarks.simulator_speed import run

    return run(chosen)


def add_engine(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`tandem bench engine`."""
    parser = kinds.add_parser(
        "engine",
        help="the engine alone, beside this machine's limits",
        description="Measures decode, prefill, overhead, prefix cache and memory of one engine.",
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, a GGUF file or a Hugging Face folder")
    parser.add_argument("--dtype", default="float32", help="as in cluster.yaml (float32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="(all cores)")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/json-output.md)")
    parser.set_defaults(run=_run_engine)


def _run_engine(chosen: argparse.Namespace) -> int:
    from benchmarks.engine import run

    return run(chosen)
