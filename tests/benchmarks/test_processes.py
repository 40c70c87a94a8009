"""A benchmark's processes end with it, however it ends."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_processes_are_gone_when_the_benchmark_is_killed(end: signal.Signals) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    async with asyncio.timeout(30):
        watched = os.pidfd_open(int(await parent.stdout.readline()))
        loop.add_reader(watched, gone.set)
        try:
            parent.send_signal(end)
            await parent.wait()
            await gone.wait()
        finally:
            loop.remove_reader(watched)
            os.close(watched)
