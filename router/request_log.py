"""Edge: writes the request log, off the event loop: what ended waits in a bounded queue for the disk."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from router.ended_request import EndedRequest
from router.rotating_file import RotatingFile
from tandem.errors import ConfigError

log = structlog.get_logger(__name__)

MOST_QUEUED = 10_000
"""Ends that wait for the disk; more are counted and lost, since requests matter more than their log."""
KEPT_FILES = 4
CLOSE_S = 5.0

NoteEnd = Callable[[EndedRequest], None]
"""Told of each request that ended; must not block."""


def ignore_end(_ended: EndedRequest) -> None:
    """The log is off."""


class RequestLog:
    """Owns the lines that are not written yet. All methods run on one event loop."""

    def __init__(self, file: RotatingFile, clock_zero_s: float, most_queued: int = MOST_QUEUED) -> None:
        """`clock_zero_s`: see EndedRequest.to_line."""
        self._file = file
        self._clock_zero_s = clock_zero_s
        self._ended: asyncio.Queue[EndedRequest | None] = asyncio.Queue(most_queued)
        self.lost = 0

    def note(self, ended: EndedRequest) -> None:
        """Queues a line; when the disk is too far behind, counts it as lost."""
        try:
            self._ended.put_nowait(ended)
        except asyncio.QueueFull:
            self._lose(1, "the disk is too slow")

    async def run(self) -> None:
        """Writes until close is called. What can't be written is lost, and serving goes on."""
        closing = False
        while not closing:
            queued = [await self._ended.get()]
            while not self._ended.empty():
                queued.append(self._ended.get_nowait())
            closing = None in queued
            await self._write([ended for ended in queued if ended is not None])

    async def close(self) -> None:
        """Nothing is noted any more; run ends when all is written."""
        await self._ended.put(None)

    async def _write(self, batch: Sequence[EndedRequest]) -> None:
        try:
            await asyncio.to_thread(self._append, batch)
        except OSError as error:
            self._lose(len(batch), str(error))

    def _append(self, batch: Sequence[EndedRequest]) -> None:
        self._file.append([ended.to_line(self._clock_zero_s) for ended in batch])

    def _lose(self, count: int, why: str) -> None:
        if not self.lost:
            log.warning("request log loses lines", why=why)
        self.lost += count


@asynccontextmanager
async def request_log(
    path: Path | None, most_bytes: int, clock: Callable[[], float]
) -> AsyncIterator[NoteEnd]:
    """A log that is written until the end of the block; None: off. Raises ConfigError for a bad path."""
    if path is None:
        yield ignore_end
        return
    try:
        file = RotatingFile(path, most_bytes, KEPT_FILES)
    except OSError as error:
        raise ConfigError(f"router.request_log: {path} cannot be written: {error.strerror}") from error
    with file:
        requests = RequestLog(file, time.time() - clock())
        writing = asyncio.create_task(requests.run())
        try:
            yield requests.note
        finally:
            await _finish(requests, writing)


async def _finish(requests: RequestLog, writing: "asyncio.Task[None]") -> None:
    """Writes what is queued, within a bound."""
    try:
        async with asyncio.timeout(CLOSE_S):
            await requests.close()
            await writing
    except TimeoutError:
        log.warning("request log closed before all was written")
    if requests.lost:
        log.warning("request log lost lines", lines=requests.lost)
