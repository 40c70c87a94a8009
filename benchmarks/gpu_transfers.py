"""Edge: the checks of KV transfers between two processes on one GPU."""

import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import torch

from benchmarks import gpu_peer
from benchmarks.gpu_peer import Spec
from benchmarks.gpu_pool import GpuPool
from benchmarks.gpu_report import GpuFigure
from kvtransfer.contract import PullReport
from kvtransfer.handoffs.sink import HandoffSink
from tandem.errors import TandemError, TransferError
from tandem.ids import BlockId

LAYOUTS = ((1024, 24 * 1024), (64, 737_280), (1024, 256 * 1024), (2048, 737_280))
"""Blocks and bytes of a block; scattered all over the target pool."""

ROUNDS = 9
START_S = 120.0
RELEASE_S = 2.0
COPY_SHARE = 0.7
NCCL_BLOCKS = (512, 737_280)


async def ipc_against_copy() -> list[GpuFigure]:
    """Pulls over cuda_ipc beside a copy of as many bytes within the device."""
    figures = []
    for num_blocks, block_bytes in LAYOUTS:
        spec = ("cuda_ipc", num_blocks, block_bytes)
        copied = _copy_rate(num_blocks * block_bytes)
        reports, equal = await pulls(spec, ROUNDS)
        rates = sorted(report.moved_bytes / report.move_s for report in reports)
        moved = statistics.median(rates)
        layout = f"{num_blocks} x {block_bytes} bytes, scattered"
        large = (num_blocks, block_bytes) == LAYOUTS[-1]
        text = f"{moved / 1e9:.1f} GB/s ({rates[0] / 1e9:.1f} to {rates[-1] / 1e9:.1f}), "
        text += f"{moved / copied:.2f} of a copy's {copied / 1e9:.1f} GB/s"
        limit = f">= {COPY_SHARE} of a copy" if large else ""
        figures.append(
            GpuFigure(f"cuda_ipc, {layout}", text, limit, not large or moved >= COPY_SHARE * copied)
        )
        figures.append(GpuFigure(f"cuda_ipc, {layout}: bytes", "equal" if equal else "wrong", "equal", equal))
    return figures


async def nccl_between_hosts() -> list[GpuFigure]:
    """Real NCCL between two processes that say they are two hosts: for correctness, its speed is TCP's."""
    spec = ("nccl", *NCCL_BLOCKS)
    reports, equal = await pulls(spec, 3)
    rate = statistics.median(report.moved_bytes / report.move_s for report in reports)
    what = f"nccl over its sockets, {spec[1]} x {spec[2]} bytes"
    return [
        GpuFigure(f"{what}: bytes", "equal" if equal else "wrong", "equal", equal),
        GpuFigure(f"{what}: rate", f"{rate / 1e9:.2f} GB/s"),
    ]


async def tcp_through_host() -> list[GpuFigure]:
    """The fallback of a pool on a GPU: tcp on loopback, through pinned memory on both sides."""
    spec = ("tcp", *NCCL_BLOCKS)
    reports, equal = await pulls(spec, 3)
    rate = statistics.median(report.moved_bytes / report.move_s for report in reports)
    what = f"tcp through pinned memory, {spec[1]} x {spec[2]} bytes"
    return [
        GpuFigure(f"{what}: bytes", "equal" if equal else "wrong", "equal", equal),
        GpuFigure(f"{what}: rate", f"{rate / 1e9:.2f} GB/s"),
    ]


async def sigkill() -> list[GpuFigure]:
    """Either peer is killed in the middle of a transfer."""
    figures = []
    for transport in ("cuda_ipc", "nccl"):
        spec = (transport, *LAYOUTS[-1])
        for side, seconds in (("source", await _kill_source(spec)), ("sink", await _kill_sink(spec))):
            what = f"{transport}: the other side is free after SIGKILL of the {side}"
            figures.append(GpuFigure(what, f"{seconds:.2f} s", f"<= {RELEASE_S} s", seconds <= RELEASE_S))
    return figures


def _copy_rate(size_bytes: int) -> float:
    """Bytes a second of copies within the device, as the host sees them; the median."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rates = []
    for _ in range(ROUNDS + 1):
        began_s = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        rates.append(size_bytes / (time.perf_counter() - began_s))
    return statistics.median(rates[1:])


async def pulls(spec: Spec, rounds: int) -> tuple[list[PullReport], bool]:
    """Reports after a first pull that warms up, and whether every pull brought the source's bytes."""
    original = GpuPool(spec[1], spec[2], seed=1)
    pool = GpuPool(spec[1], spec[2], seed=2)
    order = [BlockId(block) for block in range(spec[1])]
    random.Random(1).shuffle(order)
    reports, equal = [], True
    async with _source(spec, rounds + 1) as (_, address), _sink(spec, pool) as sink:
        for number in range(rounds + 1):
            pool.tensor.zero_()
            torch.cuda.synchronize()
            reports.append(await gpu_peer.pull(sink, address, spec, number, order))
            equal = equal and bool(torch.equal(pool.tensor[torch.tensor(order)], original.tensor))
    return reports[1:], equal


async def _kill_source(spec: Spec) -> float:
    """Seconds until a pull has failed after its source was killed. Raises TandemError when it succeeded."""
    pool = GpuPool(spec[1], spec[2], seed=2)
    order = [BlockId(block) for block in range(spec[1])]
    async with _source(spec, 1000) as (process, address), _sink(spec, pool) as sink:
        await gpu_peer.pull(sink, address, spec, 0, order)
        pulling = asyncio.create_task(_pull_on(sink, address, spec, order))
        await asyncio.sleep(0.05)
        process.kill()
        killed_s = time.monotonic()
        try:
            await pulling
        except TransferError:
            return time.monotonic() - killed_s
    raise TandemError("Pulls went on from a source that was killed.")


async def _pull_on(sink: HandoffSink, address: str, spec: Spec, order: list[BlockId]) -> None:
    for number in range(1, 1000):
        await gpu_peer.pull(sink, address, spec, number, order)


async def _kill_sink(spec: Spec) -> float:
    """Seconds until the source has its blocks back after its sink was killed."""
    async with _source(spec, 1) as (source, address), _peer("sink", spec, address) as sink:
        await _line(sink)
        await asyncio.sleep(0.05)
        sink.kill()
        killed_s = time.monotonic()
        await _line(source)
        return time.monotonic() - killed_s


@asynccontextmanager
async def _source(spec: Spec, offers: int) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    async with _peer("source", spec, str(offers)) as process:
        yield process, await _line(process)


@asynccontextmanager
async def _sink(spec: Spec, pool: GpuPool) -> AsyncIterator[HandoffSink]:
    # Two ranks on one GPU: NCCL refuses them (nccl #103) unless it takes the processes for two hosts.
    os.environ["NCCL_HOSTID"] = "tandem-gpu-check-here"
    async with gpu_peer.open_sink(spec, pool) as sink:
        yield sink


@asynccontextmanager
async def _peer(side: str, spec: Spec, last: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The other side; killed at the end if it still lives."""
    arguments: Sequence[str] = (side, spec[0], str(spec[1]), str(spec[2]), last)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.gpu_peer", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "NCCL_HOSTID": f"tandem-gpu-check-{side}"},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _line(process: asyncio.subprocess.Process) -> str:
    """What it printed next that is no log entry. Raises TandemError when it ended or says nothing."""
    if process.stdout is None:
        raise TandemError("The process has no pipe.")
    try:
        async with asyncio.timeout(START_S):
            while line := (await process.stdout.readline()).decode().strip():
                if line == "pulling" or line.startswith(("127.0.0.1:", "check-")):
                    return line
    except TimeoutError as error:
        raise TandemError("A process of the GPU check said nothing.") from error
    raise TandemError(f"A process of the GPU check ended with code {await process.wait()}.")
