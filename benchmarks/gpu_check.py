"""Edge: measures on a CUDA device what only one can show, and writes it to docs/measurements.

`python -m benchmarks.gpu_check` runs all of CHECKS; `--probe` only says whether there is a device. Exits 2,
with one sentence, without one, and 1 when a figure does not keep its limit.
"""

import argparse
import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from benchmarks import gpu_peer
from benchmarks.gpu_engine import llama_steps
from benchmarks.gpu_kernels import kernels
from benchmarks.gpu_report import GpuFigure, GpuMachine, render
from benchmarks.gpu_transfers import ipc_against_copy, nccl_between_hosts, sigkill, tcp_through_host

ROOT: Final = Path(__file__).resolve().parents[1]
NO_DEVICE: Final = "There is no CUDA device here, so nothing was checked."
EXIT_NO_DEVICE: Final = 2

Check = Callable[[], Awaitable[Sequence[GpuFigure]]]

CHECKS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        "cuda_ipc": ipc_against_copy,
        "nccl": nccl_between_hosts,
        "tcp": tcp_through_host,
        "sigkill": sigkill,
        "kernels": kernels,
        "engine": llama_steps,
    }
)
"""name -> what it measures. Other rooms' checks are one line each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--probe", action="store_true", help="only say whether there is a device")
    parser.add_argument("--only", choices=sorted(CHECKS), action="append", help="run this check; repeatable")
    parser.add_argument("--output", type=Path, help="where the page goes, instead of docs/measurements")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_DEVICE)
        return EXIT_NO_DEVICE
    if options.probe:
        print(f"Found {torch.cuda.get_device_name(0)}.")
        return 0
    os.environ.setdefault(gpu_peer.TOKEN_ENV, secrets.token_hex(16))
    figures = asyncio.run(_measure(options.only or list(CHECKS)))
    date = datetime.now(UTC).date().isoformat()
    target: Path = options.output or ROOT / f"docs/measurements/{date}-gpu.md"
    target.write_text(render(_machine(date), figures))
    print(f"Wrote {target}.")
    return 0 if all(found.holds for found in figures) else 1


async def _measure(names: Sequence[str]) -> list[GpuFigure]:
    figures: list[GpuFigure] = []
    for name in names:
        for found in await CHECKS[name]():
            print(
                f"{found.what}: {found.figure} (limit: {found.limit or '-'}; holds: {found.holds})",
                flush=True,
            )
            figures.append(found)
    return figures


def _machine(date: str) -> GpuMachine:
    properties = torch.cuda.get_device_properties(0)
    device = (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} of them"
    )
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return GpuMachine(date, device, versions, commit.stdout.strip() or "unknown")


if __name__ == "__main__":
    sys.exit(main())
