"""Edge: the decode worker: pulls KV when it has room, then writes tokens; one message a step."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import grpc.aio
import structlog

from decode_worker.bounded_scheduler import BoundedScheduler
from decode_worker.pipelined_scheduler import PipelinedScheduler
from decode_worker.scheduler import DecodeLeg, DecodeOutcome, DecodeScheduler, Reservation, SampleStart
from decode_worker.speculation import speculation_of
from engine.contract import LayerListener, PipelinedRunner
from engine.kv_policies.capabilities import kv_budget
from engine.leg import CommunicatorNumbers, DroppedLeg, DropReason, LoadNumbers
from engine.step import StepPlan
from engine.worker_process.worker import DRAINS, Worker, WorkerParts, open_worker
from engine.worker_process.worker_service import RouterLink
from kvtransfer.coded_sink import CodedSink
from kvtransfer.contract import BlockRange, HandoffKey, PullReport
from kvtransfer.handoffs.sink import HandoffSink
from kvtransfer.settings import transfer_config
from kvtransfer.shm.arena import arena_of, pool_memory
from kvtransfer.staging import open_staging
from tandem.errors import Overloaded, TandemError, TransferError
from tandem.ids import LegId
from tandem.sampling import SamplingParams
from tandem.v1 import worker_pb2 as wpb
from tandem.wire import address_from_wire, sampling_from_wire
from tandem.worker import Role, WorkerRecord
from tandem.worker_config import WorkerConfig

log = structlog.get_logger(__name__)


def _scheduler(parts: WorkerParts) -> DecodeScheduler:
    """Plans a step ahead where the runner can begin one early and nothing is guessed."""
    config, engine = parts.config, parts.engine
    speculation, budget = speculation_of(config), kv_budget(config)
    if budget is not None:
        return BoundedScheduler(
            parts.pool,
            budget,
            max_batch=config.max_batch,
            max_waiting=config.max_waiting,
            context_tokens=engine.context_tokens,
            eos_ids=engine.eos_ids,
        )
    if speculation is None and isinstance(engine.runner, PipelinedRunner):
        return PipelinedScheduler(
            parts.pool,
            max_batch=config.max_batch,
            max_waiting=config.max_waiting,
            context_tokens=engine.context_tokens,
            eos_ids=engine.eos_ids,
        )
    return DecodeScheduler(
        parts.pool,
        max_batch=config.max_batch,
        max_waiting=config.max_waiting,
        context_tokens=engine.context_tokens,
        eos_ids=engine.eos_ids,
        speculation=speculation,
    )


class DecodeWorker(Worker[DecodeOutcome]):
    """Fetches a leg's KV as soon as there is room, and decodes it in the running batch."""

    def __init__(self, parts: WorkerParts) -> None:
        config = parts.config
        self._scheduler = _scheduler(parts)
        super().__init__(parts, self._scheduler)
        self._staged = open_staging(config, parts.engine.cache, parts.engine.cache.pool)
        self._sink = self._open_sink(parts)
        self._sources: dict[LegId, tuple[HandoffKey, WorkerRecord]] = {}
        self._pulls: dict[LegId, asyncio.Task[PullReport]] = {}
        self._landed_early: dict[LegId, wpb.KvLanded] = {}
        self._committed = 0

    def _open_sink(self, parts: WorkerParts) -> HandoffSink:
        adopts = self._staged is None and arena_of(parts.engine.cache) is not None
        settings = (transfer_config(parts.config, adopts), self._clock, parts.token)
        observer = self.metrics.transfers
        if self._staged is None:
            return HandoffSink(parts.record, parts.engine.cache, *settings, observer=observer)
        return CodedSink(parts.record, self._staged, *settings, observer=observer)

    @classmethod
    def open(cls, config: WorkerConfig, token: str | None) -> AbstractAsyncContextManager["DecodeWorker"]:
        """Loads the model and serves until the block ends."""
        return open_worker(cls, config, token, pool_memory(config))

    def start(self, link: RouterLink, message: wpb.RouterMessage) -> None:
        """Queues a leg for its pull, or drops it with a reason."""
        start = message.start_decode
        leg_id = LegId(start.leg_id or message.start_prefill.leg_id)
        early = self._legs.get(leg_id) is link and self._scheduler.fetched_early(leg_id)
        if not early and not self._take(link, leg_id, start.request_id):
            return
        try:
            if not message.HasField("start_decode"):
                raise TandemError("A decode worker takes no StartPrefill.")
            if early:
                self._go_on(link, self._leg(start))
            else:
                self._scheduler.add(self._leg(start), self._clock())
        except Overloaded as error:
            self._drop_all([DroppedLeg(leg_id, DropReason.OVERLOADED, str(error))])
        except TandemError as error:
            self._stop(leg_id, ())
            self._drop_all([DroppedLeg(leg_id, DropReason.TOO_LARGE, str(error))])
        else:
            self._note_source(leg_id, start.source, start.epoch)
            self._pull_what_fits()

    def prefetch(self, link: RouterLink, prefetch: wpb.PrefetchKv) -> None:
        """Queues the pull of a leg that is still being read; a refused one may be started all the same."""
        leg_id = LegId(prefetch.leg_id)
        if self._draining or leg_id in self._legs:
            link.send_prefetch_lost(leg_id, "The worker drains, or has the leg already.")
            return
        self._take(link, leg_id, prefetch.request_id)
        try:
            self._scheduler.prefetch(self._early_leg(prefetch), self._clock())
        except TandemError as error:
            self._prefetch_lost(leg_id, str(error))
        else:
            self._note_source(leg_id, prefetch.source, prefetch.epoch)
            self._pull_what_fits()

    def cancel(self, link: RouterLink, leg_id: LegId, sample_indices: tuple[int, ...]) -> None:
        """Stops a leg or some of its samples; blocks that a pull writes come back when it has stopped."""
        if self._legs.get(leg_id) is not link:
            return
        self._stop(leg_id, sample_indices)
        if not sample_indices or not self._scheduler.holds(leg_id):
            self._forget(leg_id)
        self._pull_what_fits()

    def give_back(self, link: RouterLink, leg_id: LegId) -> None:
        """Of a leg that is only fetched early, the prompt is still being read: that goes on."""
        if not self._scheduler.fetched_early(leg_id):
            super().give_back(link, leg_id)
            return
        self._stop(leg_id, ())
        self._prefetch_lost(leg_id, DRAINS)

    def scheduler_load(self) -> LoadNumbers:
        """What the scheduler knows of its load."""
        return self._scheduler.load()

    def handoffs_committed(self) -> int:
        """Hand-offs committed since the start."""
        return self._committed

    def communicators(self) -> CommunicatorNumbers:
        """The NCCL communicators of its transfers."""
        found = self._sink.communicators()
        return CommunicatorNumbers(found.open, found.bytes, found.abandoned, found.wedged)

    def register(self, server: grpc.aio.Server) -> None:
        """A decode worker serves WorkerService only."""

    @asynccontextmanager
    async def transfers(self) -> AsyncIterator[None]:
        """Keeps the sink open; cancels and awaits the pulls in flight at the end."""
        try:
            yield
        finally:
            pulls = list(self._pulls.values())
            for pull in pulls:
                pull.cancel()
            await asyncio.gather(*pulls, return_exceptions=True)
            await self._sink.close()
            if self._staged is not None:
                self._staged.close()

    def scheduled(self, plan: StepPlan | None) -> LayerListener | None:
        """Ends the early fetches that were given up; their blocks may be more than the batch needed."""
        if self._end_lost():
            self._pull_what_fits()
        return None

    def after_step(self, outcome: DecodeOutcome) -> None:
        """Blocks may have become free: fetches what fits now."""
        self.metrics.observe_guesses(outcome.guesses, outcome.accepted)
        self._pull_what_fits()

    def blocks_freed(self) -> None:
        """Fetches what fits now."""
        self._end_lost()
        self._pull_what_fits()

    def holds(self, leg_id: LegId) -> bool:
        """Whether the scheduler still has this leg."""
        return self._scheduler.holds(leg_id)

    def _forget(self, leg_id: LegId) -> None:
        if leg_id not in self._pulls:
            self._sources.pop(leg_id, None)
        self._landed_early.pop(leg_id, None)
        super()._forget(leg_id)

    def _note_source(self, leg_id: LegId, source: wpb.WorkerAddress, epoch: int) -> None:
        """A pull that is under way keeps the source that it has."""
        if leg_id not in self._pulls:
            self._sources[leg_id] = (HandoffKey(leg_id, epoch), address_from_wire(source, Role.PREFILL))

    def _go_on(self, link: RouterLink, leg: DecodeLeg) -> None:
        """Starts a leg that is fetched early; when its KV is here it joins at once."""
        landed = self._scheduler.start(leg)
        self.metrics.early_fetches.labels("started").inc()
        if landed:
            link.send(wpb.WorkerMessage(kv_landed=self._landed_early.pop(leg.leg_id)))

    def _stop(self, leg_id: LegId, sample_indices: tuple[int, ...]) -> None:
        """Stops a leg or samples of it in the scheduler, with the pull that nobody wants any more."""
        if self._scheduler.cancel(leg_id, sample_indices) and leg_id in self._pulls:
            self._pulls[leg_id].cancel()

    def _end_lost(self) -> bool:
        """Whether there were early fetches that the scheduler gave up."""
        given_up = self._scheduler.take_lost()
        for lost in given_up:
            if lost.pulling:
                self._pulls[lost.leg_id].cancel()
            self._prefetch_lost(lost.leg_id, lost.message)
        return bool(given_up)

    def _prefetch_lost(self, leg_id: LegId, message: str) -> None:
        """The leg is no more here; it may come back with StartDecode."""
        self.metrics.early_fetches.labels("lost").inc()
        link = self._legs.get(leg_id)
        if link is not None:
            link.send_prefetch_lost(leg_id, message)
        self._forget(leg_id)

    def _pull_what_fits(self) -> None:
        for reservation in self._scheduler.reserve(self._clock()):
            pull = asyncio.create_task(self._pull(reservation), name=f"pull {reservation.leg_id}")
            self._pulls[reservation.leg_id] = pull
            # A callback and not a `finally`: a task that is cancelled before its first step runs neither.
            pull.add_done_callback(partial(self._pull_ended, reservation))
        self._steps.wake()

    async def _pull(self, reservation: Reservation) -> PullReport:
        """Fetches the blocks of one reservation; when it ends, nothing writes them any more."""
        key, source = self._sources[reservation.leg_id]
        leg = self._scheduler.leg(reservation.leg_id)
        return await self._sink.pull(
            key,
            source,
            BlockRange(reservation.first_block, len(reservation.target_blocks)),
            reservation.target_blocks,
            leg.priority,
            leg.deadline_s - self._clock(),
            partial(self._scheduler.exchanged, reservation.leg_id),
        )

    def _pull_ended(self, reservation: Reservation, pull: asyncio.Task[PullReport]) -> None:
        """However a pull ended, the scheduler hears of it."""
        leg_id = reservation.leg_id
        del self._pulls[leg_id]
        self._sources.pop(leg_id, None)
        error = None if pull.cancelled() else pull.exception()
        early = self._scheduler.fetched_early(leg_id)
        if pull.cancelled():
            self._scheduler.failed(leg_id)
        elif error is None:
            self._landed(reservation, pull.result())
        else:
            self._scheduler.failed(leg_id)
            fault = error.fault.value if isinstance(error, TransferError) else "internal"
            log.warning(
                "hand-off failed",
                request_id=self._request_ids.get(leg_id),
                leg_id=leg_id,
                fault=fault,
                exc_info=error,
            )
            self.metrics.transfer_faults.labels(fault).inc()
            if early:
                self._prefetch_lost(leg_id, str(error))
            else:
                self._drop_all([DroppedLeg(leg_id, DropReason.HANDOFF_FAILED, str(error))])
        self._pull_what_fits()

    def _landed(self, reservation: Reservation, report: PullReport) -> None:
        self._committed += 1
        self._observe(reservation, report)
        leg_id = reservation.leg_id
        link = self._legs.get(leg_id)
        landed = wpb.KvLanded(
            leg_id=leg_id,
            transport=report.transport,
            moved_bytes=report.moved_bytes,
            reserve_s=reservation.waited_s,
            accept_s=report.accept_s,
            move_s=report.move_s,
            commit_s=report.verify_s + report.commit_s,
        )
        if self._scheduler.landed(leg_id, self._clock()):
            if link is not None:
                link.send(wpb.WorkerMessage(kv_landed=landed))
        elif self._scheduler.fetched_early(leg_id):
            self._landed_early[leg_id] = landed

    def _observe(self, reservation: Reservation, report: PullReport) -> None:
        seconds = self.metrics.handoff_seconds
        seconds.labels("reserve").observe(reservation.waited_s)
        seconds.labels("accept").observe(report.accept_s)
        seconds.labels("ready").observe(report.ready_s)
        seconds.labels("queue").observe(report.queue_s)
        seconds.labels("move").observe(report.move_s)
        seconds.labels("verify").observe(report.verify_s)
        seconds.labels("commit").observe(report.commit_s)
        self.metrics.handoff_bytes.labels(report.transport).inc(report.moved_bytes)

    def _early_leg(self, message: wpb.PrefetchKv) -> DecodeLeg:
        return DecodeLeg(
            leg_id=LegId(message.leg_id),
            token_ids=tuple(message.token_ids),
            prompt_tokens=message.prompt_tokens,
            samples=tuple(SampleStart(index, ()) for index in message.sample_indices),
            params=SamplingParams(),
            priority=message.priority,
            deadline_s=self._clock() + message.remaining_s,
        )

    def _leg(self, message: wpb.StartDecode) -> DecodeLeg:
        return DecodeLeg(
            leg_id=LegId(message.leg_id),
            token_ids=tuple(message.token_ids),
            prompt_tokens=message.prompt_tokens,
            samples=tuple(
                SampleStart(sample.sample_index, tuple(sample.token_ids)) for sample in message.samples
            ),
            params=sampling_from_wire(message.sampling),
            priority=message.priority,
            deadline_s=self._clock() + message.remaining_s,
        )
