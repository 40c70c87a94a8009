"""Edge: the giving side of a worker: offers, leases, sends, and says when blocks may be freed.

The state of each hand-off is a SourceHandoff of source_protocol.py; this class carries out what it says.
All methods are called on the event loop.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import structlog

from kvtransfer.checksums import checksums_of
from kvtransfer.contract import BlockMemory, HandoffKey, PeerId, SourceTransport, Transfer, TransferConfig
from kvtransfer.handoff import HandoffState, ReleaseReason, SourceTimes
from kvtransfer.host import host_id
from kvtransfer.offers import Offer, OfferBook, SourceCounts
from kvtransfer.source_protocol import SourceInput
from kvtransfer.threads import run_to_end
from kvtransfer.tickets import TICKET_BYTES, TicketBook
from kvtransfer.transports import source_transports
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId, Incarnation, LegId, WorkerId
from tandem.worker import WorkerRecord

CLOSE_S = 1.5
"""How long `close` waits for sinks that may still read."""

INLINE_CHECKSUM_BYTES = 1024 * 1024
"""Up to so many bytes are hashed on the event loop: a tenth of a millisecond, less than a thread costs."""

_log = structlog.get_logger("tandem.kvtransfer")


@dataclass(frozen=True, slots=True)
class PullAsk:
    """A sink's wish to pull a range over a transport."""

    sink: PeerId
    digest: str
    transport: str
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class PullAnswer:
    """The lease; `lease_s` counts from now. See PullGrant for the rest."""

    lease_s: float
    source_blocks: tuple[BlockId, ...]
    checksums: tuple[int, ...]
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one transport reaches this source."""

    transport: str
    address: str
    ticket: bytes


class HandoffSource:
    """Owns the hand-offs that this worker offers.

    `on_released(key, reason)` is called exactly once for each offer, on the event loop, possibly from inside
    `withdraw` or `offer`: from then on nobody touches the blocks. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        me: WorkerRecord,
        memory: BlockMemory,
        config: TransferConfig,
        clock: Callable[[], float],
        on_released: Callable[[HandoffKey, ReleaseReason], None],
        transports: Sequence[SourceTransport] | None = None,
    ) -> None:
        self.me = me
        self.block_bytes = memory.block_bytes
        self._memory = memory
        self._config = config
        self._clock = clock
        times = SourceTimes(
            config.park_s, config.lease_s, config.fence_margin_s, config.regrasp_s, config.forget_s
        )
        self._book = OfferBook(times, on_released)
        made = source_transports(memory, config) if transports is None else transports
        self._transports = {transport.name: transport for transport in made}
        self._host_id = host_id()
        self._tickets = TicketBook()
        self._sends: set[asyncio.Task[bool]] = set()
        self._timers: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, "kv-checksum")

    async def start(self) -> None:
        """Opens the transports; one that cannot be had here is left out. Raises OSError when none can."""
        failure: OSError | None = None
        for transport in tuple(self._transports.values()):
            try:
                await transport.start(partial(self._link_lost, transport.name))
            except OSError as error:
                failure = error
                del self._transports[transport.name]
                _log.warning("transport left out", transport=transport.name, error=str(error))
        if failure is not None and not self._transports:
            raise failure
        self._timers = asyncio.create_task(self._run_timers())

    async def close(self) -> None:
        """Withdraws everything and ends within 2 s; idempotent.

        A sink that reads the blocks itself and neither finished nor died by then has its blocks released as
        CLOSED: the caller must not write to the pool after `close`.
        """
        self._book.end_all(self._clock())
        if self._timers is not None:
            try:
                async with asyncio.timeout(CLOSE_S):
                    while not self._book.all_released:
                        self._changed.clear()
                        await self._changed.wait()
            except TimeoutError:
                _log.warning("closed while sinks held leases")
            self._timers.cancel()
            for task in self._sends:
                task.cancel()
            await asyncio.gather(self._timers, *self._sends, return_exceptions=True)
            self._timers = None
        for transport in self._transports.values():
            await transport.close()
        self._book.release_all()
        self._executor.shutdown(wait=True)

    def offer(self, key: HandoffKey, blocks: Sequence[BlockId]) -> None:
        """Parks blocks for a pull; an earlier epoch of the leg is superseded.

        The blocks must not change until they are released. Raises ProtocolError for an epoch that is not
        newer than one offered before.
        """
        self._book.add(key, blocks, self._clock())
        self._changed.set()

    def withdraw(self, leg_id: LegId) -> None:
        """Ends a leg's hand-off: its blocks come back at once unless they are being read; idempotent."""
        epoch = self._book.newest_epoch(leg_id)
        if epoch is not None:
            self._book.end(HandoffKey(leg_id, epoch), SourceInput.WITHDRAW, self._clock())
            self._changed.set()

    def peer_lost(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        """Ends the hand-offs that a sink holds. What it may still read is fenced by its link or its lease."""
        peer = PeerId(worker_id, incarnation)
        self._tickets.drop(peer)
        for offer in self._book.held_by(peer):
            offer.machine.peer_suspected(self._clock())
            self._settle(offer)

    def counts(self) -> SourceCounts:
        """For metrics."""
        return self._book.counts()

    def connect(
        self, sink: PeerId, digest: str, transports: Sequence[str], sink_host_id: str
    ) -> tuple[Endpoint, ...]:
        """Where the sink can pull from, best first as the sink named them.

        Raises TransferError: DIGEST when the two don't fit, UNSUPPORTED without a transport in common.
        """
        self._check_digest(digest)
        ticket = self._tickets.ticket_of(sink) or secrets.token_bytes(TICKET_BYTES)
        endpoints = []
        for name in transports:
            transport = self._transports.get(name)
            if transport is None or (transport.same_host and sink_host_id != self._host_id):
                continue
            address = transport.endpoint(sink, ticket)
            if address is not None:
                endpoints.append(Endpoint(name, address, ticket))
        if not endpoints:
            message = f"No transport in common: asked {', '.join(transports)}."
            raise self._refusal(TransferFault.UNSUPPORTED, message)
        self._tickets.admit(sink, ticket)
        return tuple(endpoints)

    async def pull(self, ask: PullAsk) -> PullAnswer:
        """Grants a lease on a range of an offer, or raises TransferError with the fault that forbids it."""
        offer = self._find(ask)
        wanted = self._range(offer, ask)
        transport = self._transports.get(ask.transport)
        if wanted and transport is None:
            raise self._refusal(TransferFault.UNSUPPORTED, f"Transport {ask.transport} is not served.")
        checksums = await self._checksums(offer, wanted)
        direct = bool(wanted) and transport is not None and transport.direct
        fresh = offer.machine.number != ask.transfer.number
        granted = offer.machine.pull(ask.sink, ask.transfer.number, direct, self._clock())
        self._settle(offer)
        if not granted:
            state = offer.machine.state.value
            raise self._refusal(TransferFault.REFUSED, f"The hand-off is {state} and not to be had.")
        blocks = tuple(offer.blocks[index] for index in wanted)
        if fresh:
            offer.transport = ask.transport
            self._begin(offer, ask, transport if blocks else None, blocks)
        lease_s = offer.machine.lease_left_s(self._clock())
        return PullAnswer(lease_s, blocks, checksums, len(blocks) * self.block_bytes)

    def commit(self, key: HandoffKey, sink: PeerId) -> HandoffState | None:
        """The sink verified its copy; None when the hand-off is not known (any more)."""
        offer = self._book.get(key)
        if offer is None:
            return None
        offer.machine.commit(sink, self._clock())
        return self._settle(offer)

    def abort(self, key: HandoffKey, sink: PeerId) -> HandoffState | None:
        """The sink gave up; None when the hand-off is not known (any more)."""
        offer = self._book.get(key)
        if offer is None:
            return None
        offer.machine.abort(sink, self._clock())
        return self._settle(offer)

    def query(self, key: HandoffKey) -> HandoffState | None:
        """Where the hand-off stands; None when it is not known (any more)."""
        offer = self._book.get(key)
        return None if offer is None else offer.machine.state

    def _find(self, ask: PullAsk) -> Offer:
        self._check_digest(ask.digest)
        if self._tickets.ticket_of(ask.sink) is None:
            raise self._refusal(TransferFault.DISCONNECTED, "The sink did not connect to this incarnation.")
        key = ask.transfer.key
        newest = self._book.newest_epoch(key.leg_id)
        if newest is not None and key.epoch < newest:
            message = f"Epoch {key.epoch} was asked for; {newest} is offered."
            raise self._refusal(TransferFault.STALE_EPOCH, message)
        offer = self._book.get(key)
        if offer is None:
            raise self._refusal(TransferFault.REFUSED, "No such hand-off is offered.")
        return offer

    def _range(self, offer: Offer, ask: PullAsk) -> range:
        part = ask.transfer.block_range
        if part.first_layer or part.num_layers:
            raise self._refusal(TransferFault.UNSUPPORTED, "Only all layers at once can be pulled.")
        wanted = range(part.first_block, part.first_block + part.num_blocks)
        if wanted.stop > len(offer.blocks):
            message = f"Blocks {wanted.start} to {wanted.stop} were asked for; there are {len(offer.blocks)}."
            raise self._refusal(TransferFault.LENGTH, message)
        return wanted

    async def _checksums(self, offer: Offer, wanted: range) -> tuple[int, ...]:
        """Hashed at the first pull, so that a withdrawn offer costs nothing and is free at once."""
        if not self._config.checksum or offer.machine.state.terminal:
            return ()
        missing = [index for index in wanted if index not in offer.checksums]
        if missing:
            blocks = [offer.blocks[index] for index in missing]
            work = partial(checksums_of, self._memory, blocks)
            offer.machine.read_started()
            try:
                inline = len(blocks) * self.block_bytes <= INLINE_CHECKSUM_BYTES
                values = work() if inline else await run_to_end(self._executor, work)
                offer.checksums.update(zip(missing, values, strict=True))
            finally:
                offer.machine.read_ended()
                self._settle(offer)
        return tuple(offer.checksums[index] for index in wanted)

    def _begin(
        self, offer: Offer, ask: PullAsk, transport: SourceTransport | None, blocks: tuple[BlockId, ...]
    ) -> None:
        """Starts to send what was granted; an earlier attempt is told to end."""
        if offer.stop_sending is not None:
            offer.stop_sending()
            offer.stop_sending = None
        if transport is None or transport.direct:
            return
        number = ask.transfer.number
        offer.machine.send_started(number, self._clock())
        task = asyncio.create_task(_sent(transport, ask, blocks))
        offer.stop_sending = task.cancel
        self._sends.add(task)
        # A callback and not a `finally`: a task that is cancelled before its first step runs neither.
        task.add_done_callback(partial(self._send_ended, offer, number))

    def _send_ended(self, offer: Offer, number: int, task: asyncio.Task[bool]) -> None:
        self._sends.discard(task)
        succeeded = not task.cancelled() and task.exception() is None and task.result()
        offer.machine.send_ended(number, succeeded, self._clock())
        self._settle(offer)

    def _link_lost(self, transport: str, sink: PeerId) -> None:
        for offer in self._book.held_by(sink):
            if offer.transport == transport:
                offer.machine.link_lost(self._clock())
                self._settle(offer)

    def _settle(self, offer: Offer) -> HandoffState:
        state = self._book.settle(offer)
        self._changed.set()
        return state

    async def _run_timers(self) -> None:
        while True:
            self._book.tick(self._clock())
            deadline_s = self._book.next_deadline_s
            self._changed.clear()
            try:
                async with asyncio.timeout(None if deadline_s is None else deadline_s - self._clock()):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _check_digest(self, digest: str) -> None:
        if digest != self.me.digest:
            message = f"The sink has digest {digest}, this source {self.me.digest}."
            raise self._refusal(TransferFault.DIGEST, message)

    def _refusal(self, fault: TransferFault, message: str) -> TransferError:
        self._book.refused[fault] += 1
        return TransferError(fault, message)


async def _sent(transport: SourceTransport, ask: PullAsk, blocks: Sequence[BlockId]) -> bool:
    """Whether all blocks were given."""
    try:
        await transport.send(ask.sink, ask.transfer, blocks)
    except TransferError as error:
        _log.info("send failed", leg=ask.transfer.key.leg_id, fault=error.fault.value, error=str(error))
        return False
    return True
