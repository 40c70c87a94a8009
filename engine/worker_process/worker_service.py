"""Edge: a worker's side of the Attach stream, the same for prefill and decode workers."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog

from engine.leg import DroppedLeg, DropReason, LegToken
from tandem.ids import LegId
from tandem.v1 import worker_pb2 as wpb
from tandem.v1 import worker_pb2_grpc
from tandem.wire import FINISH_TO_WIRE, logprob_to_wire

log = structlog.get_logger(__name__)

HELLO_TIMEOUT_S = 5.0
LOAD_INTERVAL_S = 0.25
MAX_UNSENT_MESSAGES = 10_000
"""A router that lets this many pile up is cut off; it attaches again and its legs are placed anew."""

DROP_TO_WIRE = {reason: wpb.DropReason.Value(f"DROP_REASON_{reason.name}") for reason in DropReason}


class RouterLink:
    """One attached router: the messages it has yet to be sent."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.overrun = False
        self._unsent: deque[wpb.WorkerMessage] = deque()
        self._news = asyncio.Event()

    def send(self, message: wpb.WorkerMessage) -> None:
        """Queues a message; never blocks."""
        if len(self._unsent) >= MAX_UNSENT_MESSAGES:
            self.overrun = True
        else:
            self._unsent.append(message)
        self._news.set()

    def send_dropped(self, dropped: DroppedLeg) -> None:
        """Queues the news that a leg ended unfinished."""
        self.send(
            wpb.WorkerMessage(
                leg_dropped=wpb.LegDropped(
                    leg_id=dropped.leg_id,
                    sample_indices=dropped.sample_indices,
                    reason=DROP_TO_WIRE[dropped.reason],
                    message=dropped.message,
                )
            )
        )

    def send_prefetch_lost(self, leg_id: LegId, message: str) -> None:
        """Queues the news that a leg's KV is not fetched early."""
        self.send(wpb.WorkerMessage(prefetch_lost=wpb.PrefetchLost(leg_id=leg_id, message=message)))

    async def next(self) -> wpb.WorkerMessage:
        """The oldest unsent message; waits for one (load snapshots come at least every LOAD_INTERVAL_S)."""
        while not self._unsent:
            self._news.clear()
            await self._news.wait()
        return self._unsent.popleft()


class LegHandler(Protocol):
    """What a worker does with the instructions of routers; nothing here may block."""

    def start(self, link: RouterLink, message: wpb.RouterMessage) -> None:
        """Takes a StartPrefill or StartDecode, or drops the leg with a reason."""
        ...

    def prefetch(self, link: RouterLink, prefetch: wpb.PrefetchKv) -> None:
        """Fetches the KV of a leg that is still being read, or says that it does not."""
        ...

    def cancel(self, link: RouterLink, leg_id: LegId, sample_indices: tuple[int, ...]) -> None:
        """Stops a leg or some of its samples; unknown ones are ignored."""
        ...

    def router_lost(self, link: RouterLink) -> None:
        """Cancels every leg of a router that went away."""
        ...

    def begin_drain(self) -> None:
        """Takes no new legs from now on."""
        ...

    def load(self) -> wpb.LoadSnapshot:
        """The load now."""
        ...

    def cache_snapshot(self) -> wpb.CacheEvents:
        """The whole prefix cache."""
        ...


def step_message(step: int, tokens: Sequence[LegToken], batch_size: int, step_s: float) -> wpb.WorkerMessage:
    """One message for all tokens that a step gave to one router; those of a sample stand together."""
    sequences: list[wpb.SequenceTokens] = []
    before: LegToken | None = None
    for token in tokens:
        if before is None or (before.leg_id, before.sample_index) != (token.leg_id, token.sample_index):
            sequences.append(
                wpb.SequenceTokens(
                    leg_id=token.leg_id, sample_index=token.sample_index, first_index=token.output_index
                )
            )
        before = token
        entry = sequences[-1]
        entry.token_ids.append(token.token_id)
        if token.logprob is not None:
            entry.logprobs.append(logprob_to_wire(token.logprob))
        if token.finish is not None:
            entry.finish_reason = FINISH_TO_WIRE[token.finish]
        if token.stop_token_id is not None:
            entry.stop_token_id = token.stop_token_id
    return wpb.WorkerMessage(
        step=wpb.StepOutput(step=step, sequences=sequences, batch_size=batch_size, step_s=step_s)
    )


class AttachServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Serves WorkerService.Attach: reads instructions, writes news and the load."""

    def __init__(self, welcome: wpb.WorkerWelcome, handler: LegHandler) -> None:
        self._welcome = welcome
        self._handler = handler
        self.links: set[RouterLink] = set()

    # mypy-protobuf types only the generator form; a coroutine with context.write is what grpc.aio can cancel
    # in the middle of a write without leaving a suspended generator behind.
    async def Attach(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[wpb.RouterMessage],
        context: grpc.aio.ServicerContext[wpb.RouterMessage, wpb.WorkerMessage],
    ) -> None:
        """Lives as long as the router's stream."""
        link = await self._greet(request_iterator, context)
        self.links.add(link)
        log.info("router attached", router_id=link.router_id)
        try:
            await _first_to_end(
                self._send(link, context), self._beat(link), self._read(link, request_iterator)
            )
        finally:
            self.links.discard(link)
            self._handler.router_lost(link)
            log.info("router detached", router_id=link.router_id)
        if link.overrun:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "The router reads too slowly.")

    async def _greet(self, messages: AsyncIterator[wpb.RouterMessage], context: Any) -> RouterLink:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(aiter(messages))
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The first message must be a hello.")
        if first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The first message must be a hello.")
        if first.hello.digest != self._welcome.worker.digest:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"Router expects digest {first.hello.digest!r}, "
                f"this worker has {self._welcome.worker.digest!r}.",
            )
        link = RouterLink(first.hello.router_id)
        link.send(wpb.WorkerMessage(welcome=self._welcome))
        link.send(wpb.WorkerMessage(load=self._handler.load()))
        link.send(wpb.WorkerMessage(cache=self._handler.cache_snapshot()))
        return link

    async def _send(self, link: RouterLink, context: Any) -> None:
        while not link.overrun:
            await context.write(await link.next())

    async def _beat(self, link: RouterLink) -> None:
        """Ends with an overrun, which `_send` can't see while a write is stuck."""
        while not link.overrun:
            await asyncio.sleep(LOAD_INTERVAL_S)
            link.send(wpb.WorkerMessage(load=self._handler.load()))

    async def _read(self, link: RouterLink, messages: AsyncIterator[wpb.RouterMessage]) -> None:
        actions: dict[str, Callable[[wpb.RouterMessage], None]] = {
            "start_prefill": lambda message: self._handler.start(link, message),
            "start_decode": lambda message: self._handler.start(link, message),
            "prefetch_kv": lambda message: self._handler.prefetch(link, message.prefetch_kv),
            "cancel": lambda message: self._handler.cancel(
                link, LegId(message.cancel.leg_id), tuple(message.cancel.sample_indices)
            ),
            "cache_snapshot": lambda _: link.send(wpb.WorkerMessage(cache=self._handler.cache_snapshot())),
            "drain": lambda _: self._handler.begin_drain(),
            "ping": lambda message: link.send(wpb.WorkerMessage(pong=wpb.Pong(number=message.ping.number))),
        }
        async for message in messages:
            action = actions.get(message.WhichOneof("body") or "")
            if action is None:
                log.warning("instruction without a known body ignored", router_id=link.router_id)
            else:
                action(message)


async def _first_to_end(*parts: Coroutine[None, None, None]) -> None:
    """Runs all parts until one ends, then cancels and awaits the others; raises what the first one raised."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
