"""Edge: what prefill and decode workers share: the loaded engine, the step loop, their routers, the load."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import grpc.aio
import structlog

from engine.contract import LayerListener
from engine.cpu.pinning import on_cores
from engine.kv.blocks import BlockPool
from engine.kv.kv_cache import OpenMemory
from engine.leg import CommunicatorNumbers, DroppedLeg, DropReason, LegToken, LoadNumbers
from engine.loading import LoadedEngine, load_engine
from engine.step import StepPlan, StepResult
from engine.step_loop import StepLoop, StepScheduler
from engine.worker_process.worker_metrics import WorkerMetrics
from engine.worker_process.worker_service import AttachServicer, RouterLink, step_message
from tandem import grpc_edge
from tandem.ids import LegId
from tandem.v1 import worker_pb2 as wpb
from tandem.v1 import worker_pb2_grpc
from tandem.wire import ROLE_TO_WIRE, address_to_wire
from tandem.worker import WorkerRecord
from tandem.worker_config import WorkerConfig

log = structlog.get_logger(__name__)


class StepOutcome(Protocol):
    """What every scheduler says of a finished step."""

    @property
    def tokens(self) -> tuple[LegToken, ...]:
        """Tokens drawn, for the routers."""
        ...

    @property
    def dropped(self) -> tuple[DroppedLeg, ...]:
        """Legs that ended unfinished."""
        ...


OutcomeT = TypeVar("OutcomeT", bound=StepOutcome)
WorkerT = TypeVar("WorkerT", bound="Worker")  # type: ignore[type-arg]

SERVER_GRACE_S = 0.5

DRAINS = "The worker drains."
"""What routers are told of legs that it does not take or finish."""


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker is made of."""

    config: WorkerConfig
    record: WorkerRecord
    token: str | None
    engine: LoadedEngine
    pool: BlockPool
    torch_thread: Executor
    metrics: WorkerMetrics


class Worker(ABC, Generic[OutcomeT]):
    """One worker: owns which router each leg belongs to; its scheduler owns the legs' blocks.

    Subclasses say what the instructions and the outcome of a step mean.
    """

    def __init__(self, parts: WorkerParts, scheduler: StepScheduler[OutcomeT]) -> None:
        self.config = parts.config
        self.record = parts.record
        self.metrics = parts.metrics
        self._token = parts.token
        self._pool = parts.pool
        self._engine = parts.engine
        self._clock: Callable[[], float] = time.monotonic
        self._legs: dict[LegId, RouterLink] = {}
        self._request_ids: dict[LegId, str] = {}
        self._draining = False
        self._emptied = asyncio.Event()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._steps = StepLoop(
            scheduler,
            parts.engine.runner,
            parts.torch_thread,
            self._clock,
            self._step_done,
            self._expired,
            self.scheduled,
        )
        self._attach = AttachServicer(self._welcome(), self)

    @abstractmethod
    def start(self, link: RouterLink, message: wpb.RouterMessage) -> None:
        """Takes a leg, or drops it with a reason."""

    def prefetch(self, link: RouterLink, prefetch: wpb.PrefetchKv) -> None:
        """Fetches the KV of a leg that is still being read, or says that it does not."""
        link.send_prefetch_lost(LegId(prefetch.leg_id), f"A {self.record.role.value} worker fetches no KV.")

    @abstractmethod
    def cancel(self, link: RouterLink, leg_id: LegId, sample_indices: tuple[int, ...]) -> None:
        """Stops a leg or some of its samples; unknown ones are ignored."""

    @abstractmethod
    def scheduler_load(self) -> LoadNumbers:
        """What the scheduler knows of its load."""

    @abstractmethod
    def handoffs_committed(self) -> int:
        """Hand-offs committed since the start."""

    @abstractmethod
    def communicators(self) -> CommunicatorNumbers:
        """The NCCL communicators of its transfers."""

    @abstractmethod
    def register(self, server: grpc.aio.Server) -> None:
        """Adds the services of this kind of worker, besides WorkerService."""

    @abstractmethod
    def transfers(self) -> AbstractAsyncContextManager[None]:
        """Keeps the KV transfers of this kind of worker running."""

    @abstractmethod
    def scheduled(self, plan: StepPlan | None) -> LayerListener | None:
        """Carries out what else the scheduler decided with a plan, or without one; see StepLoop."""

    @abstractmethod
    def after_step(self, outcome: OutcomeT) -> None:
        """Carries out what else a step's outcome says, once its tokens are on their way."""

    @abstractmethod
    def blocks_freed(self) -> None:
        """Legs expired between steps: who waits for their blocks may go on."""

    @abstractmethod
    def holds(self, leg_id: LegId) -> bool:
        """Whether the scheduler still has this leg."""

    def router_lost(self, link: RouterLink) -> None:
        """Cancels every leg of a router that went away."""
        for leg_id in [leg_id for leg_id, owner in self._legs.items() if owner is link]:
            self.cancel(link, leg_id, ())

    def begin_drain(self) -> None:
        """Takes no new legs from now on."""
        self._draining = True
        self._note_if_empty()

    async def drain(self, timeout_s: float) -> None:
        """Stops taking legs, waits (bounded) for the running ones, gives the rest back to the router."""
        self.begin_drain()
        try:
            async with asyncio.timeout(timeout_s):
                await self._emptied.wait()
        except TimeoutError:
            log.warning("drain timed out", legs_left=len(self._legs))
            for leg_id, link in list(self._legs.items()):
                self.give_back(link, leg_id)

    def give_back(self, link: RouterLink, leg_id: LegId) -> None:
        """Ends a leg that was not done when the drain had to end; the router places it elsewhere."""
        link.send_dropped(DroppedLeg(leg_id, DropReason.DRAINING, DRAINS))
        self.cancel(link, leg_id, ())

    async def failed(self) -> None:
        """Returns (by raising) when the worker can't go on."""
        await asyncio.shield(self._failure)

    def stalled_s(self) -> float:
        """Seconds that the step in flight has been running; 0 between steps."""
        return self._steps.stalled_s()

    def wedged(self) -> str | None:
        """Why only a restart of the process helps; None while all is well."""
        return self.communicators().wedged

    def load(self) -> wpb.LoadSnapshot:
        """The load now."""
        numbers = self.scheduler_load()
        self.metrics.observe_load(numbers)
        self.metrics.observe_communicators(self.communicators())
        return wpb.LoadSnapshot(
            waiting_prefill_tokens=numbers.waiting_prefill_tokens,
            waiting_legs=numbers.waiting_legs,
            running_sequences=numbers.running_sequences,
            parked_legs=numbers.parked_legs,
            total_blocks=numbers.total_blocks,
            free_blocks=numbers.free_blocks,
            allocated_blocks=numbers.allocated_blocks,
            referenced_blocks=numbers.referenced_blocks,
            steps=self._steps.steps,
            handoffs_committed=self.handoffs_committed(),
            stalled_s=self._steps.stalled_s(),
            draining=self._draining,
            busy_s=self._steps.busy_s(),
        )

    def cache_snapshot(self) -> wpb.CacheEvents:
        """The whole prefix cache."""
        self._send_cache_events()
        snapshot = self._pool.snapshot()
        return wpb.CacheEvents(first_event=snapshot.first_event, stored=snapshot.stored, snapshot=True)

    @asynccontextmanager
    async def running(self, server: grpc.aio.Server) -> AsyncIterator[None]:
        """Serves until the block ends; then cancels and awaits all that it started."""
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self._attach, server)
        self.register(server)
        async with self.transfers():
            stepping = asyncio.create_task(self._step_until_cancelled())
            try:
                await server.start()
                yield
            finally:
                await server.stop(SERVER_GRACE_S)
                stepping.cancel()
                await asyncio.gather(stepping, return_exceptions=True)

    def _take(self, link: RouterLink, leg_id: LegId, request_id: str) -> bool:
        """Notes whose leg it is; refuses one that comes twice or while draining."""
        if self._draining:
            link.send_dropped(DroppedLeg(leg_id, DropReason.DRAINING, DRAINS))
            return False
        if leg_id in self._legs:
            link.send_dropped(DroppedLeg(leg_id, DropReason.INTERNAL, "The leg is here already."))
            return False
        self._legs[leg_id] = link
        self._request_ids[leg_id] = request_id
        return True

    def _forget(self, leg_id: LegId) -> None:
        self._legs.pop(leg_id, None)
        self._request_ids.pop(leg_id, None)
        self._note_if_empty()

    def _note_if_empty(self) -> None:
        if self._draining and not self._legs:
            self._emptied.set()

    def _drop_all(self, dropped: Iterable[DroppedLeg]) -> None:
        """Tells the routers; a leg of which nothing is left is forgotten."""
        for drop in dropped:
            link = self._legs.get(drop.leg_id)
            if link is not None:
                link.send_dropped(drop)
                self.metrics.dropped.labels(drop.reason.value).inc()
                log.info(
                    "leg dropped",
                    request_id=self._request_ids[drop.leg_id],
                    leg_id=drop.leg_id,
                    reason=drop.reason.value,
                )
            if not drop.sample_indices or not self.holds(drop.leg_id):
                self._forget(drop.leg_id)

    def _expired(self, dropped: tuple[DroppedLeg, ...]) -> None:
        self._drop_all(dropped)
        self.blocks_freed()

    def _step_done(self, plan: StepPlan, result: StepResult, outcome: OutcomeT) -> None:
        by_link: defaultdict[RouterLink, list[LegToken]] = defaultdict(list)
        for token in outcome.tokens:
            link = self._legs.get(token.leg_id)
            if link is not None:
                by_link[link].append(token)
        for link, theirs in by_link.items():
            link.send(step_message(plan.step, theirs, len(plan.slices), result.compute_s))
        self._drop_all(outcome.dropped)
        self.after_step(outcome)
        for token in outcome.tokens:
            if token.finish is not None and not self.holds(token.leg_id):
                self._forget(token.leg_id)
        self._send_cache_events()
        self.metrics.observe_step(plan, result)

    def _send_cache_events(self) -> None:
        delta = self._pool.drain_events()
        if not delta.stored and not delta.removed:
            return
        events = wpb.CacheEvents(first_event=delta.first_event, stored=delta.stored, removed=delta.removed)
        for link in self._attach.links:
            link.send(wpb.WorkerMessage(cache=events))

    async def _step_until_cancelled(self) -> None:
        try:
            await self._steps.run()
        except Exception as error:
            log.exception("step failed")
            self._failure.set_exception(error)

    def _welcome(self) -> wpb.WorkerWelcome:
        return wpb.WorkerWelcome(
            worker=address_to_wire(self.record),
            role=ROLE_TO_WIRE[self.record.role],
            block_size_tokens=self.config.block_size,
            pool_blocks=self._engine.pool_blocks,
            block_bytes=self._engine.cache.block_bytes,
            context_tokens=self._engine.context_tokens,
            metrics_address=self.metrics.address,
        )


@asynccontextmanager
async def open_worker(
    make: Callable[[WorkerParts], WorkerT],
    config: WorkerConfig,
    token: str | None,
    open_memory: OpenMemory | None = None,
) -> AsyncIterator[WorkerT]:
    """Loads the model on the torch thread, binds the port, serves until the block ends.

    `open_memory` may say where the KV pool lies.

    Raises ModelError when the model can't be loaded, ConfigError when the settings can't be had here, and
    OSError when the port is taken.
    """
    torch_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torch")
    with ExitStack() as parts:
        parts.enter_context(on_cores(config.cores))
        # The thread ends, with the step in flight, before the engine unmaps the KV that the step writes.
        ending = parts.enter_context(ExitStack())
        parts.enter_context(torch_thread)
        loop = asyncio.get_running_loop()
        load = partial(load_engine, config, open_memory=open_memory)
        engine = await loop.run_in_executor(torch_thread, load)
        ending.enter_context(engine)
        metrics = parts.enter_context(WorkerMetrics.open(config))
        server = grpc_edge.server(token)
        port = grpc_edge.bind(server, config.bind_host, config.port)
        address = f"{config.advertise_host}:{port}"
        record = WorkerRecord(config.worker_id, config.incarnation, config.role, address, engine.digest)
        cache = engine.cache
        pool = BlockPool(
            *(engine.pool_blocks, config.block_size, config.prefix_cache, cache.blocks, cache.num_blocks)
        )
        worker = make(WorkerParts(config, record, token, engine, pool, torch_thread, metrics))
        async with worker.running(server):
            log.info("worker serves", worker_id=record.worker_id, address=record.address)
            yield worker
