"""Edge: processes that we own: logged to a file, stopped in order, and gone when we are."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Self

from tandem.exec_guard import guarded

TAIL_BYTES = 4096


class ChildProcess:
    """One process in a session of its own, so that the terminal's Ctrl-C reaches only us.

    On Linux the kernel kills it when we die, however we die. Must be started from a thread that lives as
    long as we do (the main thread): the kernel ties the child to the thread that made it.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._process = process

    @classmethod
    async def start(
        cls, name: str, argv: Sequence[str], log_path: Path, *, environment: Mapping[str, str] | None = None
    ) -> Self:
        """Starts it with stdin and stdout as pipes and stderr in the log file. Raises OSError."""
        with _open_for_us(log_path) as log:
            process = await asyncio.create_subprocess_exec(
                *guarded(argv),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=None if environment is None else dict(environment),
                start_new_session=True,
            )
        return cls(name, process, log_path)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.returncode

    async def send(self, data: bytes, *, end: bool) -> None:
        """Writes to its stdin, and closes it when `end`; a process that is gone already is no error here."""
        stdin = self._process.stdin
        if stdin is None:
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            stdin.write(data)
            await stdin.drain()
        if end:
            stdin.close()

    async def read_line(self) -> bytes:
        """Next line of its stdout; empty when it closed that."""
        return await self._process.stdout.readline() if self._process.stdout is not None else b""

    async def wait(self) -> int:
        """Its exit code, once it ended."""
        return await self._process.wait()

    async def stop(self, timeout_s: float) -> int:
        """Closes its stdin and sends SIGTERM; SIGKILL after the timeout. Idempotent. Gives the exit code."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            return await self._process.wait()

    def kill(self) -> None:
        """SIGKILL at once; idempotent."""
        self._signal(signal.SIGKILL)

    def log_tail(self) -> str:
        """The last lines of its log."""
        return tail(self.log_path)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def _open_for_us(path: Path) -> BinaryIO:
    """Opens a log for appending that nobody else may read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def tail(path: Path) -> str:
    """The last few kilobytes of a file; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            return file.read().decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
