"""Edge: blocking work in threads that never outlives its caller."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

ResultT = TypeVar("ResultT")


async def run_to_end(
    executor: Executor, work: Callable[[], ResultT], stop: Callable[[], None] | None = None
) -> ResultT:
    """Runs `work` in a thread and returns what it returned or raises what it raised.

    When cancelled it calls `stop`, waits until the thread has ended, and only then raises CancelledError;
    so the work must end soon after `stop`.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if stop is not None:
            stop()
        await outlast(future)
        raise


async def outlast(future: asyncio.Future[ResultT]) -> None:
    """Waits until a future is done, also when cancelled meanwhile; its outcome is left unread."""
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()
