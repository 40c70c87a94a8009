"""Edge: the giving side of a worker: offers, leases, sends, and says when blocks may be freed.

The state of each hand-off is a SourceHandoff of source_protocol.py; this class carries out what it says.
All methods are called on the event loop.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import structlog

from kvtransfer.checksums import XXH3
from kvtransfer.contract import (
    BlockMemory,
    HandoffKey,
    KvGiver,
    KvReady,
    PeerId,
    SourceTransport,
    TransferConfig,
    TransferObserver,
)
from kvtransfer.handoffs.exchanges import Exchanges
from kvtransfer.handoffs.offers import (
    CommitAnswer,
    FrameExchange,
    Offer,
    OfferBook,
    Piece,
    PullAnswer,
    PullAsk,
    SourceCounts,
)
from kvtransfer.handoffs.pairing import Agreement, Introduction, SourcePairs
from kvtransfer.handoffs.piece_sums import PieceSums
from kvtransfer.handoffs.pieces import complete, grown
from kvtransfer.handoffs.sends import Sends
from kvtransfer.handoffs.source_protocol import SourceInput
from kvtransfer.handoffs.words import HandoffState, ReleaseReason, SourceTimes
from kvtransfer.hashing import hashers
from kvtransfer.nccl.communicator import CommunicatorCounts, counts_of
from kvtransfer.shm.adopt import ADOPT
from kvtransfer.transports import source_transports
from tandem.errors import ProtocolError, TransferError, TransferFault
from tandem.ids import BlockId, Incarnation, LegId, WorkerId
from tandem.worker import WorkerRecord

CLOSE_S = 1.5
"""How long `close` waits for sinks that may still read."""

MAX_WAIT_S = 1.0
"""Longest wait of one pull for a growing offer; the sink asks again."""

_log = structlog.get_logger("tandem.kvtransfer")


class HandoffSource:
    """Owns the hand-offs that this worker offers.

    `on_released(key, reason)` is called exactly once for each offer, on the event loop, possibly from inside
    `withdraw` or `offer`: from then on nobody touches the blocks. `clock` is monotonic, in seconds; `giver`
    is for the transport adopt.
    """

    def __init__(
        self,
        me: WorkerRecord,
        memory: BlockMemory,
        config: TransferConfig,
        clock: Callable[[], float],
        on_released: Callable[[HandoffKey, ReleaseReason], None],
        transports: Sequence[SourceTransport] | None = None,
        observer: TransferObserver | None = None,
        giver: KvGiver | None = None,
    ) -> None:
        self.me = me
        self._exchanges = Exchanges(giver)
        self.block_bytes = memory.block_bytes
        self.heads = config.heads
        self._layer_bytes = memory.layer_bytes
        self._layers = memory.block_bytes // memory.layer_bytes
        self._clock = clock
        self._on_released = on_released
        self._observer = observer
        times = SourceTimes(
            config.park_s, config.lease_s, config.fence_margin_s, config.regrasp_s, config.forget_s
        )
        self._book = OfferBook(times, self._released)
        made = source_transports(memory, config) if transports is None else transports
        self._transports = {transport.name: transport for transport in made}
        self._hashers = hashers(memory) if config.checksum else {}
        self._pairs = SourcePairs(config, self._transports, tuple(self._hashers))
        # A device hashes in a launch, and takes no core from what sends: there it can wait for the pull.
        ahead = None if ADOPT in self._transports else self._hashers.get(XXH3)
        self._sums = PieceSums(self._read_ended, ahead, memory)
        self._sends = Sends(clock, self._settle)
        self._timers: asyncio.Task[None] | None = None
        self._broken: str | None = None
        self._changed = asyncio.Event()
        self._grown = asyncio.Event()

    async def start(self) -> None:
        """Opens the transports; one that cannot be had here is left out. Raises OSError when none can."""
        failure: OSError | None = None
        for name, transport in tuple(self._transports.items()):
            try:
                await transport.start(partial(self._link_lost, name), partial(self._link_refused, name))
            except OSError as error:
                failure = error
                del self._transports[name]
                _log.warning("transport left out", transport=name, error=str(error))
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
            await asyncio.gather(self._timers, self._sends.close(), return_exceptions=True)
            self._timers = None
        for transport in self._transports.values():
            await transport.close()
        self._book.release_all()
        self._sums.close()

    def offer(self, key: HandoffKey, blocks: Sequence[BlockId], ready: KvReady | None = None) -> None:
        """Parks blocks for a pull; an earlier epoch of the leg is superseded.

        `ready` says how much of them is there already, None means all; see `advance`. What is ready must not
        change until the blocks are released. Raises ProtocolError for an epoch that is not newer than one
        offered before.
        """
        whole = KvReady(len(blocks), self._layers)
        self._sums.offered(self._book.add(key, blocks, whole if ready is None else ready, self._clock()))
        self._changed.set()

    def advance(self, key: HandoffKey, ready: KvReady) -> None:
        """More of a growing offer is ready; ignored when the offer is over or unknown.

        Raises ProtocolError when it would shrink.
        """
        offer = self._book.get(key)
        if offer is None or offer.machine.state.terminal:
            return
        offer.ready = grown(offer.ready, ready)
        offer.machine.grew(self._clock())
        self._sums.offered(offer)
        self._announce()

    def withdraw(self, leg_id: LegId) -> None:
        """Ends a leg's hand-off: its blocks come back at once unless they are being read; idempotent."""
        epoch = self._book.newest_epoch(leg_id)
        if epoch is not None:
            self._book.end(HandoffKey(leg_id, epoch), SourceInput.WITHDRAW, self._clock())
            self._changed.set()

    def peer_lost(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        """Ends the hand-offs that a sink holds. What it may still read is fenced by its link or its lease."""
        peer = PeerId(worker_id, incarnation)
        self._pairs.drop(peer)
        for offer in self._book.held_by(peer):
            offer.machine.peer_suspected(self._clock())
            self._settle(offer)

    def counts(self) -> SourceCounts:
        """For metrics."""
        return self._book.counts()

    def communicators(self) -> CommunicatorCounts:
        """For metrics and the watchdog."""
        return counts_of(self._transports.values())

    def wedged(self) -> str | None:
        """Why blocks may never come back unless the process is started anew; None while all is well."""
        return self._broken or self.communicators().wedged

    def connect(self, who: Introduction) -> Agreement:
        """How the sink can pull from here.

        Raises TransferError: DIGEST when the two don't fit, UNSUPPORTED without a way in common.
        """
        self._check_digest(who.digest)
        self._pairs.heard_of(who.sink)
        try:
            return self._pairs.connect(who)
        except TransferError as error:
            raise self._refusal(error.fault, str(error)) from error

    async def pull(self, ask: PullAsk) -> PullAnswer:
        """Grants a lease on the first ready piece of a range. Raises TransferError when something forbids it.

        Bounded by MAX_WAIT_S. A pull that is repeated under its number is answered as it was at first.
        """
        offer = self._find(ask)
        fault = offer.range_fault(ask.transfer.block_range, self._layers)
        if fault:
            raise self._refusal(TransferFault.LENGTH, fault)
        transport = self._transports.get(ask.transport)
        if transport is None and ask.transfer.block_range.num_blocks:
            raise self._refusal(TransferFault.UNSUPPORTED, f"Transport {ask.transport} is not served.")
        number = ask.transfer.number
        if number not in offer.pieces:
            piece = None if ask.wait_s > 0 else self._next_piece(offer, ask)
            self._take(offer, ask, piece, transport)
        elif not offer.machine.pull(ask.sink, number, False, self._clock()):
            raise self._not_to_be_had(offer)
        piece = offer.pieces[number]
        if piece is None and ask.wait_s > 0:
            await self._wait_for_more(offer, ask)
        ready = piece is not None or self._next_piece(offer, ask) is not None
        return PullAnswer(offer.machine.lease_left_s(self._clock()), ready, piece)

    async def commit(
        self,
        key: HandoffKey,
        sink: PeerId,
        number: int,
        landed: Mapping[int, int],
        exchange: FrameExchange | None = None,
    ) -> CommitAnswer:
        """Compares the checksums of what landed (transfer number -> checksum); if equal, the blocks are free.

        `number` is the sink's last transfer; a commit with an earlier one changes nothing. With an `exchange`
        the sink adopts the blocks; while a step touches them it must ask again. Raises ProtocolError for
        another sink than the holder and while the offer grows, TransferError as Exchanges.give.
        """
        offer = self._book.get(key)
        if offer is None:
            return CommitAnswer(None)
        offer.machine.check_holder(sink)
        wrong: tuple[int, ...] = ()
        if number == offer.machine.number and not offer.machine.state.terminal:
            if not complete(offer.ready, len(offer.blocks), self._layers):
                raise ProtocolError("A hand-off cannot be committed while its offer grows.")
            if exchange is not None and not self._exchanges.give(offer, exchange):
                return CommitAnswer(offer.machine.state)
            hasher = self._hashers.get(self._pairs.checksum(sink)) if exchange is None else None
            if hasher is not None:
                wrong = await self._sums.mismatched(offer, landed, hasher)
            if wrong:
                self.count_refusal(TransferFault.CHECKSUM)
        offer.machine.commit(sink, number, not wrong, self._clock())
        return CommitAnswer(self._settle(offer), wrong)

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

    def count_refusal(self, fault: TransferFault) -> None:
        """A sink's request was refused; for metrics."""
        self._book.refused[fault] += 1
        if self._observer is not None:
            self._observer.refused(fault)

    def _find(self, ask: PullAsk) -> Offer:
        self._check_digest(ask.digest)
        if not self._pairs.knows(ask.sink):
            raise self._refusal(TransferFault.DISCONNECTED, "The sink did not connect to this incarnation.")
        self._pairs.heard_of(ask.sink)
        key = ask.transfer.key
        newest = self._book.newest_epoch(key.leg_id)
        if newest is not None and key.epoch < newest:
            message = f"Epoch {key.epoch} was asked for; {newest} is offered."
            raise self._refusal(TransferFault.STALE_EPOCH, message)
        offer = self._book.get(key)
        if offer is None:
            raise self._refusal(TransferFault.REFUSED, "No such hand-off is offered.")
        return offer

    def _next_piece(self, offer: Offer, ask: PullAsk) -> Piece | None:
        return offer.next_piece(ask.transfer.block_range, self._layers, self._layer_bytes)

    def _take(
        self, offer: Offer, ask: PullAsk, piece: Piece | None, transport: SourceTransport | None
    ) -> None:
        """Gives the sink the lease, and the piece with it if there is one. Raises TransferError (REFUSED)."""
        number = ask.transfer.number
        moves = transport if piece is not None and piece.blocks else None
        direct = moves is not None and moves.direct
        granted = offer.machine.pull(ask.sink, number, direct, self._clock())
        self._settle(offer)
        if not granted:
            raise self._not_to_be_had(offer)
        offer.pieces[number] = piece
        offer.transport = ask.transport
        if offer.stop_sending is not None:
            offer.stop_sending()
            offer.stop_sending = None
        if moves is None or piece is None:
            return
        hasher = self._hashers.get(self._pairs.checksum(ask.sink))
        if hasher is not None and moves.name != ADOPT:
            self._sums.begin(offer, number, piece, hasher)
        if not moves.direct:
            self._sends.begin(offer, ask, moves, piece)

    async def _wait_for_more(self, offer: Offer, ask: PullAsk) -> None:
        """Until something of the range is ready, the sink has lost the lease, or the time is over."""
        number = ask.transfer.number
        try:
            async with asyncio.timeout(min(ask.wait_s, MAX_WAIT_S)):
                while self._next_piece(offer, ask) is None:
                    if offer.machine.state.terminal or offer.machine.number != number:
                        raise self._not_to_be_had(offer)
                    await self._grown.wait()
        except TimeoutError:
            return

    def _read_ended(self, offer: Offer) -> None:
        offer.machine.read_ended()
        self._settle(offer)

    def _released(self, key: HandoffKey, reason: ReleaseReason) -> None:
        self._sums.forget(key)
        try:
            self._on_released(key, reason)
        except Exception:
            self._give_up("The owner of the blocks could not take them back.")
            raise

    def _link_lost(self, transport: str, sink: PeerId) -> None:
        self._pairs.link_lost(sink, self._clock())
        self._changed.set()
        for offer in self._book.held_by(sink):
            if offer.transport == transport:
                offer.machine.link_lost(self._clock())
                self._settle(offer)

    def _link_refused(self, transport: str, fault: TransferFault) -> None:
        if self._observer is not None:
            self._observer.link_refused(transport, fault)

    def _settle(self, offer: Offer) -> HandoffState:
        state = self._book.settle(offer)
        self._changed.set()
        if state.terminal:
            self._announce()
        return state

    def _announce(self) -> None:
        """Wakes the pulls that wait."""
        woken, self._grown = self._grown, asyncio.Event()
        woken.set()

    async def _run_timers(self) -> None:
        try:
            while True:
                self._book.tick(self._clock())
                self._pairs.tick(self._clock())
                known = (self._book.next_deadline_s, self._pairs.next_deadline_s)
                deadlines_s = [deadline_s for deadline_s in known if deadline_s is not None]
                self._changed.clear()
                left_s = min(deadlines_s) - self._clock() if deadlines_s else None
                with suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._changed.wait()
        except Exception:
            self._give_up("The timers of the source failed: leases do not end.")
            raise

    def _give_up(self, why: str) -> None:
        """In a handler of an error that leaves blocks with nobody: who asks `wedged` ends the process."""
        self._broken = self._broken or why
        _log.critical("hand-offs cannot go on", reason=why, exc_info=True)

    def _check_digest(self, digest: str) -> None:
        if digest != self.me.digest:
            raise self._refusal(TransferFault.DIGEST, f"The sink has {digest}, this source {self.me.digest}.")

    def _refusal(self, fault: TransferFault, message: str) -> TransferError:
        self.count_refusal(fault)
        return TransferError(fault, message)

    def _not_to_be_had(self, offer: Offer) -> TransferError:
        message = f"The hand-off is {offer.machine.state.value} and not to be had."
        return self._refusal(TransferFault.REFUSED, message)
