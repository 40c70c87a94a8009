"""Hand-offs between two hosts, as far as one machine can show: namespaces with their own addresses."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.kvtransfer.wire import NoWire, Wire, wire

ROOT = Path(__file__).resolve().parents[2]
SIZE = ("8", "65536")
LEGS = 3


@asynccontextmanager
async def inside(namespace: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A side of the pair in a namespace; killed at the end if it still lives."""
    process = await asyncio.create_subprocess_exec(
        *("ip", "netns", "exec", namespace, sys.executable, "-m", "tests.kvtransfer.namespace_process"),
        *arguments,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def answer_of(process: asyncio.subprocess.Process) -> str:
    """Its next line that is not a log entry."""
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while line := (await process.stdout.readline()).decode().strip():
            if " " not in line or line == "bytes differ":
                return line
    raise AssertionError("the process ended early")


async def pulled(made: Wire) -> list[str]:
    """The transports of all legs, pulled from one namespace into the other."""
    async with inside(made.names[0], "source", made.addresses[0], *SIZE, str(LEGS)) as source:
        address = await answer_of(source)
        assert address.startswith(made.addresses[0])
        async with inside(made.names[1], "sink", address, *SIZE, str(LEGS)) as sink:
            return [await answer_of(sink) for _ in range(LEGS)]


@pytest.mark.parametrize(
    ("delay_s", "loss"), [(0.0, 0.0), (0.01, 0.0), (0.002, 0.02)], ids=["plain", "delay", "loss"]
)
async def test_handoffs_between_namespaces(delay_s: float, loss: float) -> None:
    """Shared memory is not offered to another host, though it would work here; tcp brings every byte."""
    try:
        async with wire(delay_s, loss) as made:
            assert await pulled(made) == ["tcp"] * LEGS
            assert made.carried * 1500 > LEGS * 8 * 65536
            assert (made.lost > 0) is (loss > 0)
    except NoWire as reason:
        pytest.skip(f"no network namespaces here: {reason}")
