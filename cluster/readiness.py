"""Edge: waits until a cluster serves, and says what is missing when it does not."""

import asyncio
from collections.abc import Callable, Collection
from typing import Protocol

from cluster.child_process import ChildProcess
from cluster.store import Store
from tandem.client import AsyncTandemClient
from tandem.errors import NotReady, TandemError
from tandem.ids import WorkerId

POLL_S = 0.1

ATTEMPTS = 3
"""A worker that failed so often before it ever served will not come."""


async def wait_for_workers(
    store: Store,
    expected: Collection[WorkerId],
    on_worker: Callable[[WorkerId], None],
    timeout_s: float,
    logs: Callable[[WorkerId], str],
) -> None:
    """Returns when all are registered. Raises NotReady that names those missing, with their logs' ends."""
    missing = set(expected)
    trouble = ""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    living = {worker.record.worker_id for worker in (await store.living()).workers}
                except TandemError as error:
                    trouble, living = f" ({error})", set()
                for worker_id in sorted(missing & living):
                    on_worker(worker_id)
                missing -= living
                if not missing:
                    return
                await _raise_if_hopeless(store, missing, logs)
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        tails = "\n".join(
            f"--- {worker_id}\n{logs(worker_id) or '(no log)'}" for worker_id in sorted(missing)
        )
        raise NotReady(
            f"Not registered after {timeout_s:g} s: {', '.join(sorted(missing))}{trouble}\n{tails}"
        ) from error


class EndingProcess(Protocol):
    """A process that should run."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        ...

    def ended(self) -> NotReady:
        """The error that says how it ended."""
        ...


async def _raise_if_hopeless(store: Store, missing: set[WorkerId], logs: Callable[[WorkerId], str]) -> None:
    """Raises NotReady for a worker that failed so often that it will fail again."""
    try:
        failures = await store.failures()
    except TandemError:
        # The next round asks again, and the timeout says that the registry is away.
        return
    for worker_id in sorted(missing & failures.keys()):
        if failures[worker_id].count >= ATTEMPTS:
            raise NotReady(
                f"{worker_id} failed {failures[worker_id].count} times, last with: "
                f"{failures[worker_id].last_reason}\n{logs(worker_id)}".rstrip()
            )


async def wait_for_router(router: EndingProcess, address: str, timeout_s: float) -> None:
    """Returns when the router can serve requests. Raises NotReady with its reason or its log's end."""
    reason = "no answer yet"
    async with AsyncTandemClient(address) as client:
        try:
            async with asyncio.timeout(timeout_s):
                while router.exit_code is None:
                    try:
                        status = await client.status()
                    except TandemError as error:
                        reason = str(error)
                    else:
                        if status.ready:
                            return
                        reason = status.not_ready_reason
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise NotReady(f"The router is not ready after {timeout_s:g} s: {reason}") from error
    raise router.ended()


def ended(child: ChildProcess) -> NotReady:
    """The error for a process that ended by itself."""
    return NotReady(f"{child.name} ended with code {child.exit_code}:\n{child.log_tail() or '(no log)'}")
