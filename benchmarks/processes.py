"""Edge: processes of a benchmark: started, asked in lines over their pipes, and stopped whatever happens."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from tandem.errors import TandemError
from tandem.exec_guard import guarded

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0

LINE_BYTES = 1 << 24
"""Longest line that a process may answer."""


@asynccontextmanager
async def running_module(
    module: str, arguments: Sequence[str] = (), cores: set[int] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs a module on some cores (None means all); stopped, by force if need be, when the block ends."""
    async with running_command((sys.executable, "-m", module, *arguments)) as process:
        if cores is not None:
            os.sched_setaffinity(process.pid, cores)
        yield process


@asynccontextmanager
async def running_command(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs a command, in our environment unless one is given; stopped as `running_module`'s process is.

    So is what it started itself. Should this process be killed, the kernel kills the command, too.
    """
    process = await asyncio.create_subprocess_exec(
        *guarded(command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES,
        env=None if environment is None else dict(environment),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        await _stop(process)


async def exchange(
    process: asyncio.subprocess.Process, line: bytes, timeout_s: float = START_TIMEOUT_S
) -> bytes:
    """Writes a line and reads one. Raises TandemError when the process ended or did not answer."""
    if process.stdin is None or process.stdout is None:
        raise TandemError("The process has no pipes.")
    try:
        async with asyncio.timeout(timeout_s):
            process.stdin.write(line)
            await process.stdin.drain()
            answer = await process.stdout.readline()
    except (TimeoutError, ConnectionError) as error:
        raise TandemError(f"A benchmark process did not answer: {error}") from error
    if not answer:
        raise TandemError(f"A benchmark process ended with code {await process.wait()}.")
    return answer


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        await _end(process)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
