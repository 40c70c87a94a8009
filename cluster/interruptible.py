"""Edge: runs a program that owns processes: the first Ctrl-C stops it in order, the second at once."""

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import psutil

EXIT_KILLED = 130


def run_interruptible(program: Coroutine[Any, Any, int]) -> int:
    """Runs it in this (the main) thread; gives its exit code, or 128 + signal when it was interrupted."""
    return asyncio.run(_run(program))


async def _run(program: Coroutine[Any, Any, int]) -> int:
    task = asyncio.ensure_future(program)
    caught: list[signal.Signals] = []

    def interrupt(number: signal.Signals) -> None:
        if caught:
            _kill_everything()
        caught.append(number)
        print("\nStopping; once more to kill.", file=sys.stderr, flush=True)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)
    try:
        return await task
    except asyncio.CancelledError:
        return 128 + caught[0] if caught else 1


def _kill_everything() -> None:
    """Kills all our descendants, then us; the kernel frees what they held."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(EXIT_KILLED)
