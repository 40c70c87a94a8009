"""Edge: the prefill worker: prompt in; first tokens to the router at once, KV parked for a pull."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import grpc.aio

from engine.contract import LayerListener
from engine.leg import CommunicatorNumbers, DroppedLeg, DropReason, LoadNumbers
from engine.step import StepPlan
from engine.worker_process.worker import Worker, WorkerParts, log, open_worker
from engine.worker_process.worker_service import RouterLink
from kvtransfer.coded_source import CodedSource
from kvtransfer.contract import BlockMemory, HandoffKey, KvReady, SourceTransport, TransferConfig
from kvtransfer.handoffs.service import HandoffServicer
from kvtransfer.handoffs.source import HandoffSource
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.settings import transfer_config
from kvtransfer.shm.arena import arena_of, pool_memory
from kvtransfer.staging import open_staging
from kvtransfer.transports import source_transports
from prefill_worker.scheduler import GrownLeg, OfferedLeg, PrefillLeg, PrefillOutcome, PrefillScheduler
from tandem.errors import Overloaded, TandemError
from tandem.ids import BlockId, LegId
from tandem.v1 import worker_pb2 as wpb
from tandem.v1 import worker_pb2_grpc
from tandem.wire import sampling_from_wire
from tandem.worker_config import WorkerConfig


class PrefillWorker(Worker[PrefillOutcome]):
    """Reads prompts in chunks, samples token 0, and keeps the KV until a decode worker has pulled it.

    KV of long prompts can be pulled while they are read: by blocks, and in the last chunk by layers.
    """

    def __init__(self, parts: WorkerParts) -> None:
        config = parts.config
        self._scheduler = PrefillScheduler(
            parts.pool,
            token_budget=config.token_budget,
            max_waiting=config.max_waiting,
            context_tokens=parts.engine.context_tokens,
            eos_ids=parts.engine.eos_ids,
            overlap_min_tokens=config.overlap_min_tokens,
        )
        self._layers = parts.engine.model_config.layers
        super().__init__(parts, self._scheduler)
        self._staged = open_staging(config, parts.engine.cache, parts.engine.cache.pool)
        self._source = self._open_source(parts)

    @classmethod
    def open(cls, config: WorkerConfig, token: str | None) -> AbstractAsyncContextManager["PrefillWorker"]:
        """Loads the model and serves until the block ends."""
        return open_worker(cls, config, token, pool_memory(config))

    def _open_source(self, parts: WorkerParts) -> HandoffSource:
        memory, staged = parts.engine.cache, self._staged
        self._arena = arena_of(memory) if staged is None else None
        if self._arena is not None and parts.pool.caches:
            log.info("blocks are copied, not adopted", reason="the prefix cache keeps them")
        transfers = transfer_config(parts.config, self._arena is not None and not parts.pool.caches)
        transports = self.source_transports(memory if staged is None else staged, transfers)
        times, observer = (self._clock, self._released), self.metrics.transfers
        if staged is None:
            return HandoffSource(parts.record, memory, transfers, *times, transports, observer, self)
        return CodedSource(parts.record, staged, transfers, *times, transports, observer)

    def source_transports(self, memory: BlockMemory, config: TransferConfig) -> Sequence[SourceTransport]:
        """The giving sides of the transports; a drill may put others around them. Raises ConfigError."""
        return source_transports(memory, config)

    def give(self, leg_id: LegId, taker: int, given: Sequence[BlockId], taken: Sequence[BlockId]) -> bool:
        """See KvGiver."""
        if self._arena is None or not self._scheduler.giving.may_give(leg_id, given):
            return False
        pairs = self._arena.give(taker, given, taken)
        self._scheduler.giving.gave(leg_id, pairs)
        # Of fewer pairs than there are blocks the taker has gone; the KV is nobody's then.
        return bool(pairs)

    def start(self, link: RouterLink, message: wpb.RouterMessage) -> None:
        """Queues a prompt, or drops the leg with a reason."""
        leg_id = LegId(message.start_prefill.leg_id or message.start_decode.leg_id)
        if not self._take(link, leg_id, message.start_prefill.request_id):
            return
        try:
            if not message.HasField("start_prefill"):
                raise TandemError("A prefill worker takes no StartDecode.")
            self._scheduler.add(self._leg(message.start_prefill), self._clock())
        except Overloaded as error:
            self._drop_all([DroppedLeg(leg_id, DropReason.OVERLOADED, str(error))])
        except TandemError as error:
            self._drop_all([DroppedLeg(leg_id, DropReason.TOO_LARGE, str(error))])
        self._steps.wake()

    def cancel(self, link: RouterLink, leg_id: LegId, sample_indices: tuple[int, ...]) -> None:
        """Stops a leg: its blocks come back within one step, or at the fence when a pull is in flight."""
        if self._legs.get(leg_id) is not link:
            return
        offered_to_nobody = self._scheduler.cancel(leg_id, sample_indices)
        if offered_to_nobody or not sample_indices or not self._scheduler.holds(leg_id):
            self._forget(leg_id)
        self._steps.wake()

    def scheduler_load(self) -> LoadNumbers:
        """What the scheduler knows of its load."""
        return self._scheduler.load()

    def handoffs_committed(self) -> int:
        """Hand-offs committed since the start."""
        return self._source.counts().committed

    def handoffs_in_flight(self) -> int:
        """Hand-offs that a sink pulls now."""
        return self._source.counts().in_flight

    def communicators(self) -> CommunicatorNumbers:
        """The NCCL communicators of its transfers."""
        found = self._source.communicators()
        return CommunicatorNumbers(found.open, found.bytes, found.abandoned, found.wedged)

    def wedged(self) -> str | None:
        """As for every worker; and when blocks of hand-offs may never come back."""
        return self._source.wedged()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds HandoffService."""
        worker_pb2_grpc.add_HandoffServiceServicer_to_server(HandoffServicer(self._source), server)

    @asynccontextmanager
    async def transfers(self) -> AsyncIterator[None]:
        """Keeps the source's transports and timers running."""
        await self._source.start()
        try:
            yield
        finally:
            await self._source.close()
            if self._staged is not None:
                self._staged.close()

    def scheduled(self, plan: StepPlan | None) -> LayerListener | None:
        """Offers the KV of the long prompts that were begun; follows the layers of those that end."""
        for opened in self._scheduler.take_opened():
            self._offer(opened)
        finishing = self._scheduler.finishing()
        return partial(self._layers_done, finishing) if finishing else None

    def after_step(self, outcome: PrefillOutcome) -> None:
        """Offers the KV of the prompts that are read, and more of those that are offered already."""
        for grown in outcome.grown:
            self._source.advance(HandoffKey(grown.leg_id, grown.epoch), KvReady(grown.ready_blocks, 0))
        for offered in outcome.offered:
            self._offer(offered)

    def blocks_freed(self) -> None:
        """The next step takes what is free."""
        self._steps.wake()

    def holds(self, leg_id: LegId) -> bool:
        """Whether the scheduler still has this leg."""
        return self._scheduler.holds(leg_id)

    def _forget(self, leg_id: LegId) -> None:
        """Before the withdrawal: a router wants no news of a leg that it cancelled, or that is dropped."""
        super()._forget(leg_id)
        self._source.withdraw(leg_id)

    def _offer(self, offered: OfferedLeg) -> None:
        """Lets the KV be pulled, as far as it is there, and tells the router."""
        link = self._legs.get(offered.leg_id)
        if link is None:
            (self._source.withdraw if offered.stands else self._scheduler.release)(offered.leg_id)
            return
        key = HandoffKey(offered.leg_id, offered.epoch)
        ready = KvReady(offered.ready_blocks, 0 if offered.growing else self._layers)
        if offered.stands:
            self._source.advance(key, ready)
        else:
            self._source.offer(key, offered.blocks, ready)
        link.send(wpb.WorkerMessage(kv_offered=self._offer_message(offered)))
        if not self._scheduler.holds(offered.leg_id):
            # Its KV was pulled to the last block before its token was drawn.
            self._forget(offered.leg_id)

    def _layers_done(self, finishing: tuple[GrownLeg, ...], layers: int) -> None:
        for grown in finishing:
            self._source.advance(HandoffKey(grown.leg_id, grown.epoch), KvReady(grown.ready_blocks, layers))

    def _offer_message(self, offered: OfferedLeg) -> wpb.KvOffered:
        return wpb.KvOffered(
            leg_id=offered.leg_id,
            kv_tokens=offered.kv_tokens,
            cached_tokens=offered.cached_tokens,
            queue_s=offered.queue_s,
            compute_s=offered.compute_s,
            park_s=self.config.park_s,
            epoch=offered.epoch,
            growing=offered.growing,
        )

    def _leg(self, message: wpb.StartPrefill) -> PrefillLeg:
        return PrefillLeg(
            leg_id=LegId(message.leg_id),
            token_ids=tuple(message.token_ids),
            prompt_tokens=message.prompt_tokens,
            sample_indices=tuple(message.sample_indices),
            params=sampling_from_wire(message.sampling),
            priority=message.priority,
            deadline_s=self._clock() + message.remaining_s,
        )

    def _released(self, key: HandoffKey, reason: ReleaseReason) -> None:
        """The offer is over: frees the blocks. Unless they were handed over, a leg that is read lost its KV.

        A leg that is still being read goes on.
        """
        committed = reason is ReleaseReason.COMMITTED
        self._scheduler.release(key.leg_id, committed)
        if not self._scheduler.holds(key.leg_id):
            if not committed:
                message = f"The offer ended: {reason.value}."
                self._drop_all([DroppedLeg(key.leg_id, DropReason.OFFER_EXPIRED, message)])
            self._forget(key.leg_id)
        self._steps.wake()
