"""Edge: the taking side of a worker: pulls a leg's KV into its own blocks and verifies it.

The state of each hand-off is a SinkHandoff of sink_protocol.py; this class carries out what it says.
"""

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from kvtransfer.checksums import verify
from kvtransfer.contract import (
    BlockMemory,
    BlockRange,
    HandoffKey,
    PeerId,
    PullGrant,
    PullReport,
    SinkTransport,
    Transfer,
    TransferConfig,
)
from kvtransfer.handoff import HandoffState, SinkTimes
from kvtransfer.handoff_client import HandoffClient, PullTerms
from kvtransfer.priority import PriorityGate
from kvtransfer.sink_protocol import SinkHandoff
from kvtransfer.sources import KnownSource, KnownSources
from kvtransfer.threads import run_to_end
from kvtransfer.transports import sink_transports
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId, Incarnation, WorkerId
from tandem.worker import WorkerRecord

CALL_S = 0.5
"""Bound of one small call (commit, abort, query); lost ones are repeated within their own bounds."""

CLOSING = "This sink is closing."

CLOSE_S = 1.5
"""How long `close` waits for pulls to fail."""

RETRY_PAUSE_S = 0.05
"""Pause before a call that failed at once is repeated."""

_log = structlog.get_logger("tandem.kvtransfer")


@dataclass(frozen=True, slots=True)
class _Pull:
    """What one call of `pull` wants."""

    machine: SinkHandoff
    source: KnownSource
    block_range: BlockRange
    targets: tuple[BlockId, ...]
    priority: int
    deadline_s: float


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
    ) -> None:
        self._memory = memory
        self._config = config
        self._clock = clock
        made = sink_transports(memory, config, clock) if transports is None else transports
        self._transports = {transport.name: transport for transport in made}
        self._sources = KnownSources(
            tuple(self._transports),
            lambda source: HandoffClient(me, source, token),
            config.connect_timeout_s,
            self._source_gone,
        )
        self._times = SinkTimes(config.connect_timeout_s, config.settle_s)
        self._gate = PriorityGate(config.max_pulls)
        self._numbers = itertools.count(1)
        self._aborts: set[asyncio.Task[None]] = set()
        self._closing = False
        self._running: set[_Running] = set()
        self._ended = asyncio.Event()
        self._executor = ThreadPoolExecutor(max(1, config.max_pulls), "kv-verify")

    async def pull(
        self,
        key: HandoffKey,
        source: WorkerRecord,
        block_range: BlockRange,
        target_blocks: Sequence[BlockId],
        priority: int,
        remaining_s: float,
    ) -> PullReport:
        """Fills the target blocks with a range of the leg's blocks, tells the source, and says what it cost.

        Tries the transports in order. Raises TransferError when none brought verified bytes in time. When it
        returns, raises or is cancelled, nothing here touches the target blocks any more; unless it returned,
        their content means nothing. A pull is tried once for a key: after a failure the source has freed it.
        """
        if len(target_blocks) != block_range.num_blocks:
            message = f"{len(target_blocks)} target blocks were given for {block_range.num_blocks}."
            raise TransferError(TransferFault.LENGTH, message)
        if self._closing:
            raise TransferError(TransferFault.DISCONNECTED, CLOSING)
        deadline_s = self._clock() + remaining_s
        machine = SinkHandoff(key, self._times, deadline_s)
        running = _Running(PeerId.of(source), asyncio.timeout(remaining_s))
        try:
            async with running.bound:
                self._running.add(running)
                async with self._gate.turn(priority):
                    known = await self._sources.get(source)
                    pull = _Pull(machine, known, block_range, tuple(target_blocks), priority, deadline_s)
                    return await self._over_any_transport(pull)
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

    async def peer_lost(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        """Ends what runs with a source that is gone, and closes the connections to it."""
        await self._source_gone(PeerId(worker_id, incarnation))

    async def _source_gone(self, peer: PeerId) -> None:
        """Unmaps and disconnects too: a mapping would keep the dead process's pool in memory."""
        self._end([running for running in self._running if running.peer == peer], "The source is lost.")
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

    async def _over_any_transport(self, pull: _Pull) -> PullReport:
        if not pull.targets:
            return await self._attempt(pull, None)
        failure = TransferError(TransferFault.UNSUPPORTED, "No transport was left to try.")
        for endpoint in pull.source.endpoints:
            if pull.machine.state.terminal:
                break
            transport = self._transports[endpoint.transport]
            peer = pull.source.peer
            try:
                await transport.connect(peer, endpoint.address, endpoint.ticket, pull.source.block_bytes)
                return await self._attempt(pull, transport)
            except TransferError as error:
                failure = error
                _log.info(
                    "transfer failed",
                    leg=pull.machine.key.leg_id,
                    transport=transport.name,
                    fault=error.fault.value,
                    error=str(error),
                )
        raise failure

    async def _attempt(self, pull: _Pull, transport: SinkTransport | None) -> PullReport:
        """One transfer over one transport; without a transport there is nothing to move."""
        machine = pull.machine
        asked_s = self._clock()
        grant = await self._ask(pull, "" if transport is None else transport.name)
        accepted_s = self._clock()
        machine.move_started()
        try:
            if transport is not None:
                await self._move(pull, transport, grant)
            moved_s = self._clock()
            if not machine.moved(moved_s):
                raise TransferError(TransferFault.LEASE, "The lease ended before all blocks had come.")
            await self._verify(pull.targets, grant)
        except (TransferError, asyncio.CancelledError):
            machine.move_failed()
            raise
        machine.verified(self._clock())
        await self._commit(pull)
        return PullReport(
            transport="" if transport is None else transport.name,
            moved_bytes=grant.length_bytes,
            accept_s=accepted_s - asked_s,
            move_s=moved_s - accepted_s,
            commit_s=self._clock() - moved_s,
        )

    async def _ask(self, pull: _Pull, transport: str) -> PullGrant:
        """A lease. An unanswered pull is repeated once under the same number: it grants only once."""
        machine = pull.machine
        number = next(self._numbers)
        transfer = Transfer(machine.key, number, pull.block_range)
        machine.ask(number, self._clock())
        for last in (False, True):
            asked_s = self._clock()
            terms = PullTerms(transfer, transport, pull.priority, max(0.0, pull.deadline_s - asked_s))
            try:
                grant = await pull.source.client.pull(terms, asked_s, self._times.answer_s / 2)
            except TransferError as error:
                if error.fault in (TransferFault.DISCONNECTED, TransferFault.TIMEOUT):
                    if not last:
                        await asyncio.sleep(RETRY_PAUSE_S)
                        continue
                    await self._sources.forget_failed(pull.source)
                machine.refused(number)
                raise
            machine.granted(number, grant.lease_until_s)
            if grant.length_bytes != len(pull.targets) * self._memory.block_bytes:
                machine.cancel()
                message = f"{grant.length_bytes} bytes were granted for {len(pull.targets)} blocks."
                raise TransferError(TransferFault.LENGTH, message)
            return grant
        raise TransferError(TransferFault.TIMEOUT, "The pull was not answered.")

    async def _move(self, pull: _Pull, transport: SinkTransport, grant: PullGrant) -> None:
        try:
            async with asyncio.timeout(grant.lease_until_s - self._clock()):
                await transport.receive(pull.source.peer, grant, pull.targets)
        except TimeoutError as error:
            raise TransferError(TransferFault.LEASE, "The lease ended during the transfer.") from error

    async def _verify(self, targets: Sequence[BlockId], grant: PullGrant) -> None:
        if not self._config.checksum or not targets:
            return
        stop = threading.Event()
        await run_to_end(
            self._executor, lambda: verify(self._memory, targets, grant.checksums, stop.is_set), stop.set
        )

    async def _commit(self, pull: _Pull) -> None:
        """Until the source agrees or can no longer be asked. Raises TransferError when it had given up."""
        machine, client = pull.machine, pull.source.client
        failures = 0
        while not machine.state.terminal:
            asking = client.query if failures % 2 else client.commit
            try:
                state = await asking(machine.key, CALL_S)
            except TransferError as error:
                failures += 1
                if error.fault is TransferFault.REFUSED:
                    machine.status(None, self._clock())
                elif error.fault is TransferFault.DISCONNECTED and failures > 1:
                    machine.source_lost()
                else:
                    machine.tick(self._clock())
                    await asyncio.sleep(RETRY_PAUSE_S)
                continue
            failures += state is not None and not state.terminal
            machine.status(state, self._clock())
        if not machine.may_use:
            raise TransferError(TransferFault.LEASE, "The source had taken its offer back before the commit.")

    def _tell_abort(self, key: HandoffKey, source: WorkerRecord) -> None:
        """In a task of its own, so that a cancelled caller need not wait; `close` waits for it."""
        task = asyncio.create_task(self._abort(key, source))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _abort(self, key: HandoffKey, source: WorkerRecord) -> None:
        try:
            known = await self._sources.get(source)
            state: HandoffState | None = await known.client.abort(key, CALL_S)
        except TransferError as error:
            # Its lease ends the hand-off at the source.
            _log.info("abort not delivered", leg=key.leg_id, error=str(error))
            return
        _log.debug("abort delivered", leg=key.leg_id, state=None if state is None else state.value)
