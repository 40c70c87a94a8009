"""Edge: work that never outlives its caller, in threads and tasks, and work that may never return."""

import asyncio
import threading
import traceback
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, wait
from concurrent.futures import Future as ConcurrentFuture
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


async def run_to_end(
    executor: Executor, work: Callable[[], ResultT], stop: Callable[[], None] | None = None
) -> ResultT:
    """Runs `work` in a thread and returns what it returned or raises what it raised.

    When cancelled it calls `stop`, waits until the thread has ended, and only then raises CancelledError;
    so the work must end soon after `stop`.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, contained, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if stop is not None:
            stop()
        await outlast(future)
        raise


def run_beside(helpers: Executor, works: Sequence[Callable[[], None]], stop: Callable[[], None]) -> None:
    """Runs the first work in this thread and the others in the helpers'; raises what failed first.

    When one fails, it calls `stop`, and it returns or raises only when all have ended; so the works must end
    soon after `stop`. This thread works too instead of waiting: two threads that are woken together start on
    one core, and a transfer is over before the system has moved one of them.
    """
    failures: list[BaseException] = []

    def attempt(work: Callable[[], None]) -> None:
        try:
            contained(work)
        except BaseException as error:
            failures.append(error)
            stop()

    futures = [helpers.submit(attempt, work) for work in works[1:]]
    attempt(works[0])
    wait(futures)
    if failures:
        raise failures[0]


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The seconds that work took."""
    began_s = clock()
    work()
    return clock() - began_s


async def outlast(future: asyncio.Future[ResultT]) -> bool:
    """Waits until a future is done, also when cancelled meanwhile; its outcome is left unread.

    Whether it was cancelled: a caller that would go on otherwise must pass that on.
    """
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            cancelled = True
    if not future.cancelled():
        future.exception()
    return cancelled


async def to_its_end(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """What the work returned or raised, once it has ended; it must be bounded.

    For what must not be left half done: when cancelled it goes on, and CancelledError is raised at its end.
    """
    running = asyncio.create_task(work)
    if await outlast(running):
        raise asyncio.CancelledError
    return running.result()


def contained(work: Callable[[], ResultT]) -> ResultT:
    """Runs the work; an error leaves without the locals of its frames, which hold views of the cache."""
    try:
        return work()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def in_daemon_thread(work: Callable[[], ResultT], name: str) -> asyncio.Future[ResultT]:
    """Runs work that may never return in a thread of its own, which does not keep the process alive.

    The future cannot be used to stop it; await it shielded and with a bound.
    """
    outcome: ConcurrentFuture[ResultT] = ConcurrentFuture()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return asyncio.wrap_future(outcome)
