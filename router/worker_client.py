"""Edge: the router's end of the Attach stream to one worker: attach, listen, write, ping, attach again.

A worker is lost the moment its stream breaks, membership drops it, or it has said nothing for `silence_s`
(load snapshots come at least twice a second, and pings twice a second are answered at once). Silence is
counted in short waits of our own loop, each of which must end without news: a router that was itself held up
on a busy machine does not blame its workers for it.
"""

import asyncio
import time
from collections import deque
from typing import Protocol, TypeAlias

import grpc.aio
import structlog

from router.worker_key import WorkerKey
from tandem import grpc_edge
from tandem.v1 import worker_pb2 as wpb
from tandem.v1 import worker_pb2_grpc
from tandem.worker import WorkerRecord

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S = 2.0
FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 1.0
STEADY_S = 5.0
"""A stream that held for so long starts the pauses from the shortest again."""
TICK_S = 0.25
PING_EVERY_TICKS = 2
MAX_UNSENT_MESSAGES = 10_000
"""A worker that lets this many pile up is cut off."""


_AttachCall: TypeAlias = "grpc.aio.StreamStreamCall[wpb.RouterMessage, wpb.WorkerMessage]"


class LinkListener(Protocol):
    """Whom a link tells its news; nothing here may block."""

    def attached(self, record: WorkerRecord, welcome: wpb.WorkerWelcome) -> None:
        """The worker can be sent legs from now on."""
        ...

    def heard(self, key: WorkerKey, message: wpb.WorkerMessage) -> None:
        """A message came from an attached worker."""
        ...

    def lost(self, key: WorkerKey, reason: str) -> None:
        """The worker was attached and is so no more: all its legs are gone."""
        ...


class _LinkDown(Exception):
    """The stream can't go on; the text says why."""


class WorkerLink:
    """One life of one worker, attached again and again until `run` is cancelled."""

    def __init__(
        self,
        record: WorkerRecord,
        hello: wpb.RouterHello,
        token: str | None,
        silence_s: float,
        listener: LinkListener,
    ) -> None:
        self.record = record
        self.key = WorkerKey(record.worker_id, record.incarnation)
        self.attached = False
        self.last_problem = "not attached yet"
        self._hello = hello
        self._token = token
        self._silent_ticks_allowed = max(1, round(silence_s / TICK_S))
        self._listener = listener
        self._unsent: deque[wpb.RouterMessage] = deque()
        self._to_send = asyncio.Event()
        self._silent_ticks = 0

    def send(self, message: wpb.RouterMessage) -> None:
        """Queues a message; dropped when the worker is not attached (its legs are lost then anyway)."""
        if self.attached:
            self._unsent.append(message)
            self._to_send.set()

    async def run(self) -> None:
        """Attaches, and again with growing pauses, until cancelled."""
        backoff_s = FIRST_BACKOFF_S
        try:
            while True:
                began_s = time.monotonic()
                await self._attach_once()
                held = time.monotonic() - began_s > STEADY_S
                backoff_s = FIRST_BACKOFF_S if held else min(LONGEST_BACKOFF_S, backoff_s * 2)
                await asyncio.sleep(backoff_s)
        finally:
            self.detach("The worker left the membership.")

    def detach(self, reason: str) -> None:
        """Tells the listener at once that the worker is lost; idempotent."""
        self.last_problem = reason
        if self.attached:
            self.attached = False
            self._unsent.clear()
            self._listener.lost(self.key, reason)

    async def _attach_once(self) -> None:
        """One stream from hello to its end."""
        async with grpc_edge.channel(self.record.address) as channel:
            call = worker_pb2_grpc.WorkerServiceStub(channel).Attach(metadata=grpc_edge.bearer(self._token))
            try:
                welcome = await self._greet(call)
                self._silent_ticks = 0
                self.attached = True
                self._listener.attached(self.record, welcome)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._read(call))
                    tasks.create_task(self._write(call))
                    tasks.create_task(self._watch_silence())
            except* _LinkDown as down:
                reason = str(down.exceptions[0])
            finally:
                call.cancel()
            if reason != self.last_problem:
                log.warning("worker link down", worker_id=self.record.worker_id, reason=reason)
            self.detach(reason)

    async def _greet(self, call: _AttachCall) -> wpb.WorkerWelcome:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await call.write(wpb.RouterMessage(hello=self._hello))
                first = await call.read()
        except TimeoutError:
            raise _LinkDown("The worker did not answer in time.") from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise _LinkDown(await _why(call, error)) from None
        if not isinstance(first, wpb.WorkerMessage) or first.WhichOneof("body") != "welcome":
            raise _LinkDown("The worker's first message was no welcome.")
        address = first.welcome.worker
        if (address.worker_id, address.incarnation, address.digest) != (*self.key, self.record.digest):
            raise _LinkDown(
                f"Another worker answers there: {address.worker_id} of incarnation {address.incarnation}."
            )
        return first.welcome

    async def _read(self, call: _AttachCall) -> None:
        heard, key = self._listener.heard, self.key
        try:
            while isinstance(message := await call.read(), wpb.WorkerMessage):
                self._silent_ticks = 0
                heard(key, message)
        except grpc.aio.AioRpcError as error:
            raise _LinkDown(await _why(call, error)) from None
        except Exception:
            log.exception("a worker's message could not be handled", worker_id=key.worker_id)
            raise _LinkDown("A message could not be handled.") from None
        raise _LinkDown("The worker closed the stream.")

    async def _write(self, call: _AttachCall) -> None:
        try:
            while True:
                while self._unsent:
                    await call.write(self._unsent.popleft())
                self._to_send.clear()
                await self._to_send.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise _LinkDown(await _why(call, error)) from None

    async def _watch_silence(self) -> None:
        number = 0
        while True:
            if number % PING_EVERY_TICKS == 0:
                self.send(wpb.RouterMessage(ping=wpb.Ping(number=number)))
            number += 1
            await asyncio.sleep(TICK_S)
            self._silent_ticks += 1
            if self._silent_ticks > self._silent_ticks_allowed:
                raise _LinkDown(f"Silent for {self._silent_ticks_allowed * TICK_S:g} s, pings unanswered.")
            if len(self._unsent) > MAX_UNSENT_MESSAGES:
                raise _LinkDown(f"The worker takes no messages; {len(self._unsent)} wait.")


async def _why(call: _AttachCall, error: Exception) -> str:
    """One line on why a call ended."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"The stream ended ({await call.code()})." if call.done() else str(error)
