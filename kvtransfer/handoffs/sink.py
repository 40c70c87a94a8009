"""Edge: the taking side of a worker; each pull of a leg's KV is a Pulling of pulling.py."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from kvtransfer.contract import (
    BlockMemory,
    BlockRange,
    HandoffKey,
    PeerId,
    PullReport,
    SinkTransport,
    TransferConfig,
    TransferObserver,
)
from kvtransfer.handoffs.adoption import Adoption, OnExchanged
from kvtransfer.handoffs.client import HandoffClient
from kvtransfer.handoffs.priority import PriorityGate
from kvtransfer.handoffs.pull_order import OnPiece, PullOrder, PullTools
from kvtransfer.handoffs.pulling import Pulling
from kvtransfer.handoffs.roads import Roads
from kvtransfer.handoffs.sink_protocol import SinkHandoff
from kvtransfer.handoffs.sources import KnownSources
from kvtransfer.handoffs.words import HandoffState, SinkTimes
from kvtransfer.hashing import hashers
from kvtransfer.nccl.communicator import CommunicatorCounts, counts_of
from kvtransfer.shm.arena import arena_of
from kvtransfer.threads import to_its_end
from kvtransfer.transports import sink_transports
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId, Incarnation, WorkerId
from tandem.worker import WorkerRecord

ABORT_CALL_S = 0.5
"""Bound of the one call that tells a source of an abort; when it is lost, the lease ends the hand-off."""

CLOSING = "This sink is closing."

CLOSE_S = 1.5
"""How long `close` waits for pulls to fail."""

_log = structlog.get_logger("tandem.kvtransfer")


@dataclass(slots=True, eq=False)
class _Running:
    """A call of `pull` under way, and how to end it from outside."""

    peer: PeerId
    bound: asyncio.Timeout
    ended_by: str = ""


class HandoffSink:
    """Pulls hand-offs for one worker; `clock` is monotonic, in seconds, and `token` the cluster's."""

    def __init__(
        self,
        me: WorkerRecord,
        memory: BlockMemory,
        config: TransferConfig,
        clock: Callable[[], float],
        token: str | None,
        transports: Sequence[SinkTransport] | None = None,
        observer: TransferObserver | None = None,
    ) -> None:
        self._clock = clock
        self._arena = arena_of(memory)
        made = sink_transports(memory, config, clock) if transports is None else transports
        self._transports = {transport.name: transport for transport in made}
        own_hashers = hashers(memory) if config.checksum else {}
        self._sources = KnownSources(
            tuple(self._transports),
            lambda source: HandoffClient(me, source, token),
            config,
            tuple(own_hashers),
            self._source_gone,
        )
        self._roads = Roads(config, clock, observer)
        self._executor = ThreadPoolExecutor(max(1, config.max_pulls), "kv-hash")
        self._tools = PullTools(
            memory=memory,
            config=config,
            times=SinkTimes(config.connect_timeout_s, config.settle_s),
            clock=clock,
            transports=self._transports,
            sources=self._sources,
            roads=self._roads,
            gate=PriorityGate(config.max_pulls),
            executor=self._executor,
            hashers=own_hashers,
        )
        self._aborts: set[asyncio.Task[None]] = set()
        self._closing = False
        self._running: set[_Running] = set()
        self._ended = asyncio.Event()

    async def pull(
        self,
        key: HandoffKey,
        source: WorkerRecord,
        block_range: BlockRange,
        target_blocks: Sequence[BlockId],
        priority: int,
        remaining_s: float,
        on_exchanged: OnExchanged | None = None,
    ) -> PullReport:
        """Fills the target blocks with a range of the leg's blocks, tells the source, and says what it cost.

        Where blocks can be adopted, `on_exchanged` is told, before the end of the pull however it ends, which
        of the target blocks are another worker's now, and which hold the KV in their stead; without it all
        are copied.

        An offer that grows is pulled piece by piece as it gets ready. A transport that fails is replaced by
        the next. Raises TransferError when none brought the right bytes in time, or the source gave up. When
        it returns, raises or is cancelled, nothing here touches the target blocks any more; unless it
        returned, their content means nothing. A pull is tried once for a key: after a failure the source has
        freed it.
        """
        wanted = block_range, target_blocks
        return await self._pull(key, source, *wanted, priority, remaining_s, lambda _part: None, on_exchanged)

    async def _pull(
        self,
        key: HandoffKey,
        source: WorkerRecord,
        block_range: BlockRange,
        target_blocks: Sequence[BlockId],
        priority: int,
        remaining_s: float,
        on_piece: OnPiece,
        on_exchanged: OnExchanged | None = None,
    ) -> PullReport:
        """As `pull`, telling of each piece."""
        if len(target_blocks) != block_range.num_blocks:
            message = f"{len(target_blocks)} target blocks were given for {block_range.num_blocks}."
            raise TransferError(TransferFault.LENGTH, message)
        if self._closing:
            raise TransferError(TransferFault.DISCONNECTED, CLOSING)
        deadline_s = self._clock() + remaining_s
        machine = SinkHandoff(key, self._tools.times, deadline_s)
        running = _Running(PeerId.of(source), asyncio.timeout(remaining_s))
        try:
            async with running.bound:
                self._running.add(running)
                known = await self._sources.get(source)
                order = PullOrder(known, block_range, tuple(target_blocks), priority, deadline_s, on_piece)
                adoption = None
                if self._arena is not None and on_exchanged is not None and target_blocks:
                    first_block = block_range.first_block
                    adoption = Adoption(self._arena, first_block, target_blocks, on_exchanged)
                return await Pulling(self._tools, machine, order, adoption).run()
        except TimeoutError as error:
            if running.ended_by:
                raise TransferError(TransferFault.DISCONNECTED, running.ended_by) from error
            raise TransferError(TransferFault.TIMEOUT, "The request's deadline ended the pull.") from error
        finally:
            self._running.discard(running)
            if not machine.state.terminal:
                machine.cancel()
            if machine.owes_abort:
                machine.abort_sent()
                self._tell_abort(key, source)
            self._ended.set()

    def communicators(self) -> CommunicatorCounts:
        """For metrics and the watchdog."""
        return counts_of(self._transports.values())

    async def peer_lost(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        """Ends what runs with a source that is gone, and closes the connections to it."""
        await self._source_gone(PeerId(worker_id, incarnation))

    async def _source_gone(self, peer: PeerId) -> None:
        """All of it, also when the pull that noticed is cancelled: half of it nobody would do later."""
        await to_its_end(self._part_from(peer))

    async def _part_from(self, peer: PeerId) -> None:
        """Unmaps and disconnects too: a mapping would keep the dead process's pool in memory."""
        self._end([running for running in self._running if running.peer == peer], "The source is lost.")
        self._roads.forget(peer)
        await self._sources.forget(peer)
        for transport in self._transports.values():
            await transport.disconnect(peer)

    async def close(self) -> None:
        """Ends what runs, tells the sources, and closes everything within about 2 s; idempotent."""
        self._closing = True
        self._end(tuple(self._running), CLOSING)
        try:
            async with asyncio.timeout(CLOSE_S):
                while self._running:
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            _log.warning("closed while pulls were running", pulls=len(self._running))
        await asyncio.gather(*self._aborts, return_exceptions=True)
        for transport in self._transports.values():
            await transport.close()
        await self._sources.close()
        self._executor.shutdown(wait=True)

    def _end(self, pulls: Sequence["_Running"], why: str) -> None:
        """Makes pulls end as if their deadline were now."""
        for running in pulls:
            running.ended_by = why
            if not running.bound.expired():
                running.bound.reschedule(asyncio.get_running_loop().time())

    def _tell_abort(self, key: HandoffKey, source: WorkerRecord) -> None:
        """In a task of its own, so that a cancelled caller need not wait; `close` waits for it."""
        task = asyncio.create_task(self._abort(key, source))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _abort(self, key: HandoffKey, source: WorkerRecord) -> None:
        try:
            known = await self._sources.get(source)
            state: HandoffState | None = await known.client.abort(key, ABORT_CALL_S)
        except TransferError as error:
            # Its lease ends the hand-off at the source.
            _log.info("abort not delivered", leg=key.leg_id, error=str(error))
            return
        _log.debug("abort delivered", leg=key.leg_id, state=None if state is None else state.value)
