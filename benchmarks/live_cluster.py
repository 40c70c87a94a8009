"""Edge: `tandem up` as a process of its own, for benchmarks that measure a whole cluster."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml

from tandem.client import AsyncTandemClient
from tandem.errors import NotReady, TandemError

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.5
MAX_LOG_CHARACTERS = 2000


@asynccontextmanager
async def live_cluster(settings: Mapping[str, Any]) -> AsyncIterator[str]:
    """Starts a cluster with these keys of cluster.yaml on free ports; gives its gRPC address once it serves.

    Raises NotReady with the end of its log when it does not; the cluster is stopped when the block ends.
    """
    ports = {"grpc_port": _free_port(), "http_port": _free_port()}
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        log = Path(folder, "up.log")
        document = {**settings, "router": {**settings.get("router", {}), **ports}}
        process = await _started(_written(folder, document), log)
        address = f"127.0.0.1:{ports['grpc_port']}"
        try:
            await _until_ready(process, address, log)
            yield address
        finally:
            await _stop(process)


def _written(folder: str, document: Mapping[str, Any]) -> Path:
    file = Path(folder, "cluster.yaml")
    file.write_text(yaml.safe_dump(document))
    return file


async def _started(file: Path, log: Path) -> asyncio.subprocess.Process:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tandem.cli.main", "up", "-f", str(file)),
            stdout=descriptor,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


async def _until_ready(process: asyncio.subprocess.Process, address: str, log: Path) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            while process.returncode is None:
                if await _is_ready(address):
                    return
                await asyncio.sleep(POLL_S)
    said = await asyncio.to_thread(log.read_text, errors="replace")
    raise NotReady(f"The cluster to measure does not serve:\n{said[-MAX_LOG_CHARACTERS:]}")


async def _is_ready(address: str) -> bool:
    try:
        async with AsyncTandemClient(address) as client:
            return bool((await client.status()).ready)
    except TandemError:
        return False


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Lets it drain; then by force, its children too."""
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
