"""Edge: the prefill worker: prompt in; first tokens to the router at once, KV parked for a pull."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc.aio

from engine.leg import CommunicatorNumbers, DroppedLeg, DropReason, LoadNumbers
from engine.worker import Worker, WorkerParts, open_worker
from engine.worker_service import RouterLink
from kvtransfer.contract import HandoffKey
from kvtransfer.handoff import ReleaseReason
from kvtransfer.handoff_service import HandoffServicer
from kvtransfer.settings import transfer_config
from kvtransfer.source import HandoffSource
from prefill_worker.scheduler import OfferedLeg, PrefillLeg, PrefillOutcome, PrefillScheduler
from tandem.errors import Overloaded, TandemError
from tandem.ids import LegId
from tandem.v1 import worker_pb2 as wpb
from tandem.v1 import worker_pb2_grpc
from tandem.wire import sampling_from_wire
from tandem.worker_config import WorkerConfig

OFFER_EPOCH = 1
"""A leg is offered once; when its hand-off fails it is placed anew under another leg id."""


class PrefillWorker(Worker[PrefillOutcome]):
    """Reads prompts in chunks, samples token 0, and keeps the KV until a decode worker has pulled it."""

    def __init__(self, parts: WorkerParts) -> None:
        config = parts.config
        self._scheduler = PrefillScheduler(
            parts.pool,
            token_budget=config.token_budget,
            max_waiting=config.max_waiting,
            context_tokens=parts.engine.context_tokens,
            eos_ids=parts.engine.eos_ids,
        )
        super().__init__(parts, self._scheduler)
        self._source = HandoffSource(
            parts.record,
            parts.engine.cache,
            transfer_config(config),
            self._clock,
            self._released,
            observer=self.metrics.transfers,
        )

    @classmethod
    def open(cls, config: WorkerConfig, token: str | None) -> AbstractAsyncContextManager["PrefillWorker"]:
        """Loads the model and serves until the block ends."""
        return open_worker(cls, config, token)

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
        parked_for_nobody = self._scheduler.cancel(leg_id, sample_indices)
        if parked_for_nobody or not sample_indices or not self._scheduler.holds(leg_id):
            # Forgotten before the withdrawal: its router wants no news of a leg that it cancelled.
            self._forget(leg_id)
        if parked_for_nobody:
            self._source.withdraw(leg_id)
        self._steps.wake()

    def scheduler_load(self) -> LoadNumbers:
        """What the scheduler knows of its load."""
        return self._scheduler.load()

    def handoffs_committed(self) -> int:
        """Hand-offs committed since the start."""
        return self._source.counts().committed

    def communicators(self) -> CommunicatorNumbers:
        """The NCCL communicators of its transfers."""
        found = self._source.communicators()
        return CommunicatorNumbers(found.open, found.bytes, found.abandoned, found.wedged)

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

    def after_step(self, outcome: PrefillOutcome) -> None:
        """Offers the KV of the prompts that are read."""
        for offered in outcome.offered:
            link = self._legs.get(offered.leg_id)
            if link is None:
                self._scheduler.release(offered.leg_id)
                continue
            self._source.offer(HandoffKey(offered.leg_id, OFFER_EPOCH), offered.blocks)
            link.send(wpb.WorkerMessage(kv_offered=self._offer_message(offered)))

    def blocks_freed(self) -> None:
        """The next step takes what is free."""
        self._steps.wake()

    def holds(self, leg_id: LegId) -> bool:
        """Whether the scheduler still has this leg."""
        return self._scheduler.holds(leg_id)

    def _offer_message(self, offered: OfferedLeg) -> wpb.KvOffered:
        return wpb.KvOffered(
            leg_id=offered.leg_id,
            kv_tokens=offered.kv_tokens,
            cached_tokens=offered.cached_tokens,
            queue_s=offered.queue_s,
            compute_s=offered.compute_s,
            park_s=self.config.park_s,
            epoch=OFFER_EPOCH,
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
        """The pull ended or never came: frees the blocks; unless it was committed, the leg lost its KV."""
        self._scheduler.release(key.leg_id)
        if reason is not ReleaseReason.COMMITTED:
            self._drop_all(
                [DroppedLeg(key.leg_id, DropReason.OFFER_EXPIRED, f"The offer ended: {reason.value}.")]
            )
        self._forget(key.leg_id)
        self._steps.wake()
