"""Edge: a worker inside a Ray actor: it has a thread and event loop of its own, Ray's answers control.

Ray runs the constructor again when it restarts the actor, so every life serves without being told to. A life
that cannot go on ends its process; Ray's restart is the retry.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable

import uvloop

from cluster.worker_host import WorkerSpec, host_worker
from tandem.logs import configure_logging

CRASH_PAUSE_S = 1.0
"""A worker that cannot start (a bad model, a taken port) is retried at most this often."""

CLOSE_TIMEOUT_S = 5.0

EXIT_FAILED = 1


class WorkerActor:
    """One worker for the actor's life; `spec_json` is WorkerSpec.to_json()."""

    def __init__(self, spec_json: str) -> None:
        self._spec = WorkerSpec.from_json(spec_json)
        if self._spec.log_file:
            _send_output_to(self._spec.log_file)
        self._stopping = threading.Event()
        self._stop_serving: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._serve, name="worker", daemon=True)
        self._thread.start()

    def pid(self) -> int:
        """The actor's process."""
        return os.getpid()

    def drain(self) -> bool:
        """Stops serving in order; True when it ended within the drain timeout and some time to close."""
        self._stopping.set()
        self._stop_serving()
        self._thread.join(self._spec.drain_timeout_s + CLOSE_TIMEOUT_S)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        configure_logging()
        try:
            uvloop.run(self._serve_until_stopped())
        except Exception:
            # host_worker has logged it.
            if not self._stopping.wait(CRASH_PAUSE_S):
                os._exit(EXIT_FAILED)

    async def _serve_until_stopped(self) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def stop_serving() -> None:
            with contextlib.suppress(RuntimeError):
                # The loop is closed when the worker has ended already.
                loop.call_soon_threadsafe(stop.set)

        self._stop_serving = stop_serving
        if self._stopping.is_set():
            stop.set()
        await host_worker(self._spec, stop)


def _send_output_to(path: str) -> None:
    """Sends stdout and stderr of this process, C libraries included, to the end of a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
