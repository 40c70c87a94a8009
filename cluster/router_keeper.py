"""Edge: keeps one router process running: starts it, and starts it anew on the same ports when it dies."""

import asyncio
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import structlog

from cluster import readiness
from cluster.child_process import ChildProcess
from cluster.router_host import BoundPorts, RouterSpec
from tandem.errors import NotReady

log = structlog.get_logger(__name__)

BIND_TIMEOUT_S = 60.0
MAX_RESTARTS = 5
RESTART_WINDOW_S = 60.0
"""A router that dies more often than MAX_RESTARTS in this time won't get better by another start."""


class RouterKeeper:
    """Owns the router's process; a client that was cut off finds the next one at the same address."""

    def __init__(self, spec: RouterSpec, log_path: Path, secrets: Mapping[str, str]) -> None:
        self._spec = spec
        self._log_path = log_path
        self._environment = {**os.environ, **secrets}
        self._child: ChildProcess | None = None
        self._keeping: asyncio.Task[NotReady] | None = None

    @property
    def pid(self) -> int:
        """Process id of the router that runs now. Raises NotReady before the start."""
        return self._running().pid

    @property
    def exit_code(self) -> int | None:
        """None while the router runs."""
        return self._running().exit_code

    def ended(self) -> NotReady:
        """The error that says how the router ended."""
        return readiness.ended(self._running())

    async def start(self, timeout_s: float) -> BoundPorts:
        """Starts the router and waits for its ports, which stay the same from now on. Raises NotReady."""
        ports = await self._start_child(min(BIND_TIMEOUT_S, timeout_s))
        config = replace(self._spec.config, grpc_port=ports.grpc_port, http_port=ports.http_port)
        self._spec = replace(self._spec, config=config)
        self._keeping = asyncio.create_task(self._keep())
        return ports

    async def failed(self) -> NotReady:
        """Waits until the router can't be kept running, and says why."""
        if self._keeping is None:
            raise NotReady("The router was not started.")
        return await asyncio.shield(self._keeping)

    async def stop(self, timeout_s: float) -> None:
        """Lets the router drain, kills it after the timeout; idempotent."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._child is not None:
            await self._child.stop(timeout_s)

    async def _keep(self) -> NotReady:
        restarts: deque[float] = deque()
        while True:
            await self._running().wait()
            failure = self.ended()
            log.warning("router ended", exit_code=self.exit_code)
            now_s = time.monotonic()
            restarts.append(now_s)
            while now_s - restarts[0] > RESTART_WINDOW_S:
                restarts.popleft()
            if len(restarts) > MAX_RESTARTS:
                return failure
            try:
                await self._start_child(BIND_TIMEOUT_S)
            except NotReady as error:
                return error

    async def _start_child(self, timeout_s: float) -> BoundPorts:
        command = [sys.executable, "-m", "cluster.router_host"]
        child = await ChildProcess.start("router", command, self._log_path, environment=self._environment)
        self._child = child
        await child.send(self._spec.to_line(), end=False)
        try:
            async with asyncio.timeout(timeout_s):
                line = await child.read_line()
                if line:
                    return BoundPorts.from_line(line)
                await child.wait()
        except TimeoutError as error:
            raise NotReady(f"The router did not bind its ports in time:\n{child.log_tail()}") from error
        raise self.ended()

    def _running(self) -> ChildProcess:
        if self._child is None:
            raise NotReady("The router was not started.")
        return self._child
