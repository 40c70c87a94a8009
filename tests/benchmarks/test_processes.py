"""A benchmark's processes end with it, however it ends."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.processes import exchange, running_command

GRANDPARENT = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid, flush=True)
sys.stdin.read()
"""

ROOT = Path(__file__).resolve().parents[2]

PARENT = """
import asyncio
from benchmarks.processes import running_module

async def main():
    # A server that does not look at its stdin.
    async with running_module("http.server", ("0", "--bind", "127.0.0.1")) as process:
        print(process.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def gone(pid: int) -> AsyncIterator[None]:
    """At its end waits until a process of now has ended."""
    loop, ended, watched = asyncio.get_running_loop(), asyncio.Event(), os.pidfd_open(pid)
    loop.add_reader(watched, ended.set)
    try:
        yield
        await ended.wait()
    finally:
        loop.remove_reader(watched)
        os.close(watched)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_processes_are_gone_when_the_benchmark_is_killed(end: signal.Signals) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    async with asyncio.timeout(30), gone(int(await parent.stdout.readline())):
        parent.send_signal(end)
        await parent.wait()


async def test_what_a_process_started_ends_with_it() -> None:
    async with (
        asyncio.timeout(30),
        AsyncExitStack() as watching,
        running_command((sys.executable, "-c", GRANDPARENT)) as process,
    ):
        await watching.enter_async_context(gone(int(await exchange(process, b""))))
