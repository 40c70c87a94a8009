"""Pure: the simulated pulls of KV: both live hand-off protocols, moves timed by a model, failures as told."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from decode_worker.decode_leg import Reservation
from kvtransfer.contract import BlockRange, HandoffKey, KvReady, PeerId
from kvtransfer.handoffs.pieces import complete, next_piece, remainder
from kvtransfer.handoffs.sink_protocol import SinkHandoff
from kvtransfer.handoffs.words import HandoffState, SinkTimes
from planner.latency import TransferModel
from planner.simulation.events import NEWS, EventQueue
from planner.simulation.offer import Offer
from planner.simulation.prefill import PrefillSite
from planner.simulation.setup import EarlyFetch, WorkerSpec
from router.worker_key import WorkerKey
from tandem.ids import LegId, WorkerId


class Puller(Protocol):
    """A decode worker's side of a pull."""

    @property
    def key(self) -> WorkerKey:
        """Which worker."""
        ...

    @property
    def node(self) -> str:
        """Where it is."""
        ...

    def pull_ended(self, pull: "Pull", landed: bool) -> None:
        """Nothing writes the target blocks any more; `landed`: they hold the KV."""
        ...


@dataclass(slots=True, eq=False)
class Pull:
    """One pull under way; `number` counts what is asked for, over all pulls.

    `whole` is all that is wanted, `wanted` what is left of it, `piece` what moves now.
    """

    puller: Puller
    reservation: Reservation
    source_key: WorkerKey
    source: PrefillSite | None
    offer: Offer | None
    sink: SinkHandoff
    whole: BlockRange
    wanted: BlockRange
    piece: BlockRange | None = None
    number: int = 0
    failures: int = 0
    waiting: bool = False
    sending: bool = False
    over: bool = False

    @property
    def leg_id(self) -> LegId:
        """Whose KV it is."""
        return self.reservation.leg_id


class Pulls:
    """Owns every pull of the simulated cluster."""

    def __init__(
        self,
        events: EventQueue,
        transfer: TransferModel,
        sources: Callable[[WorkerKey], PrefillSite | None],
        attempts: int,
        lease_s: float,
        early: EarlyFetch | None,
    ) -> None:
        """A pull that fails is tried over `attempts` transports; a lease lasts `lease_s`."""
        self._lease_s = lease_s
        self._early = early
        self._events = events
        self._transfer = transfer
        self._sources = sources
        self._attempts = attempts
        self._under_way: dict[LegId, Pull] = {}
        self._to_fail: Counter[WorkerId] = Counter()
        self._numbers = 0
        self.committed = 0
        self.failed = 0

    def begin(
        self,
        puller: Puller,
        reservation: Reservation,
        offered_by: tuple[WorkerKey, int],
        deadline_s: float,
    ) -> None:
        """Asks who made the offer, with its epoch, for the reserved blocks; the puller hears of the end."""
        source_key, epoch = offered_by
        key = HandoffKey(reservation.leg_id, epoch)
        source = self._sources(source_key)
        offer = None if source is None else source.offers.get(key.leg_id)
        if offer is not None and offer.source.key != key:
            offer = None
        whole = BlockRange(reservation.first_block, len(reservation.target_blocks))
        sink = SinkHandoff(key, SinkTimes(), deadline_s)
        pull = Pull(puller, reservation, source_key, source, offer, sink, whole, whole)
        self._under_way[key.leg_id] = pull
        self._attempt(pull)

    def grew(self, leg_id: LegId) -> None:
        """More of a growing offer is ready, or will be as a step goes on."""
        pull = self._under_way.get(leg_id)
        if pull is not None and pull.waiting:
            self._attempt(pull)

    def cancel(self, leg_id: LegId) -> None:
        """The puller's side gives up; it hears of the end at once."""
        pull = self._under_way.get(leg_id)
        if pull is not None:
            pull.sink.cancel()
            self._give_up(pull)

    def fail_one(self, worker: WorkerId) -> None:
        """The worker's oldest pull fails now, or its next one when none is under way."""
        for pull in self._under_way.values():
            if pull.puller.key.worker_id == worker and pull.sink.state is HandoffState.MOVING:
                self._move_failed(pull)
                return
        self._to_fail[worker] += 1

    def source_died(self, key: WorkerKey) -> None:
        """All pulls from a worker fail: its memory is gone."""
        for pull in [pull for pull in self._under_way.values() if pull.source_key == key]:
            pull.sink.source_lost()
            self._over(pull)
            pull.puller.pull_ended(pull, False)

    def sink_died(self, key: WorkerKey) -> None:
        """A puller is gone: its sources see the link break, and free the blocks after its lease."""
        now_s = self._events.now_s
        for pull in [pull for pull in self._under_way.values() if pull.puller.key == key]:
            self._over(pull)
            if pull.offer is not None and pull.source is not None:
                self._send_ended(pull, False)
                pull.offer.source.link_lost(now_s)
                pull.source.watch(pull.leg_id)

    def _attempt(self, pull: Pull) -> None:
        """Asks for what is left, and moves the first piece of it that is ready."""
        now_s = self._events.now_s
        self._numbers += 1
        pull.number, pull.piece, pull.waiting = self._numbers, None, False
        pull.sink.ask(pull.number, now_s)
        source, offer = pull.source, pull.offer
        if source is None or offer is None or not source.alive:
            pull.sink.source_lost()
            self._events.at(now_s, NEWS, self._lost, pull)
            return
        peer = PeerId(*pull.puller.key)
        if not offer.source.pull(peer, pull.number, False, now_s):
            pull.sink.refused(pull.number)
            self._events.at(now_s, NEWS, self._lost, pull)
            return
        pull.piece = self._ready_piece(pull, offer, offer.ready)
        if pull.piece is None:
            pull.sink.not_ready(pull.number)
            pull.waiting = True
            self._wait(pull, offer)
            return
        lease_until_s = now_s + offer.source.lease_left_s(now_s)
        pull.sink.granted(pull.number, lease_until_s)
        offer.source.send_started(pull.number, now_s)
        pull.sending = True
        pull.sink.move_started()
        took_s = self._moving_s(pull, pull.piece, offer, source.spec)
        self._events.at(min(now_s + took_s, lease_until_s), NEWS, self._moved, (pull, pull.number))

    def _ready_piece(self, pull: Pull, offer: Offer, ready: KvReady) -> BlockRange | None:
        """What the source grants; what is whole before anything moved moves in one go."""
        if self._early is None or (offer.complete and pull.wanted == pull.whole):
            return pull.wanted
        if complete(ready, offer.blocks, offer.layers):
            ready = KvReady(offer.blocks, offer.layers)
        return next_piece(pull.wanted, ready, offer.layers, self._early.layer_bytes)

    def _moving_s(self, pull: Pull, piece: BlockRange, offer: Offer, source: WorkerSpec) -> float:
        same_node = pull.puller.node == source.node
        if self._early is None or piece == pull.whole:
            first = piece.first_block * source.block_size
            tokens = min(piece.num_blocks * source.block_size, max(0, offer.tokens - first))
            return self._transfer.transfer_s(tokens, same_node)
        layers = piece.num_layers or offer.layers - piece.first_layer
        last = remainder(pull.wanted, piece, offer.layers) is None
        num_bytes = piece.num_blocks * layers * self._early.layer_bytes
        return self._early.model.piece_s(num_bytes, last, same_node)

    def _wait(self, pull: Pull, offer: Offer) -> None:
        """Until enough layers are ready, or half of the lease is used up; `grew` may come first."""
        due_s, enough = self._events.now_s + self._lease_s / 2, 0
        if offer.last_step is not None:
            each = range(offer.ready.layers + 1, offer.layers)
            enough = each.start + bisect_left(
                each,
                True,
                key=lambda layers: (
                    self._ready_piece(pull, offer, KvReady(offer.ready.blocks, layers)) is not None
                ),
            )
            ready_s = offer.layers_at_s(enough)
            if enough == offer.layers or ready_s is None or ready_s > due_s:
                enough = 0
            else:
                due_s = ready_s
        self._events.at(due_s, NEWS, self._waited, (pull, pull.number, enough))

    def _waited(self, waited: tuple[Pull, int, int]) -> None:
        pull, number, layers = waited
        if pull.over or not pull.waiting or number != pull.number or pull.offer is None:
            return
        if layers:
            pull.offer.grow(pull.offer.ready.blocks, layers, self._events.now_s)
        self._attempt(pull)

    def _moved(self, moved: tuple[Pull, int]) -> None:
        pull, number = moved
        if pull.over or number != pull.number or pull.offer is None or pull.source is None:
            return
        worker = pull.puller.key.worker_id
        if self._to_fail[worker] > 0:
            self._to_fail[worker] -= 1
            self._move_failed(pull)
            return
        now_s = self._events.now_s
        if not pull.sink.moved(now_s):
            self._give_up(pull)
            return
        rest = None if pull.piece is None else remainder(pull.wanted, pull.piece, pull.offer.layers)
        pull.sink.held(last=rest is None, now_s=now_s)
        self._send_ended(pull, True)
        if rest is not None:
            pull.wanted = rest
            self._attempt(pull)
            return
        source = pull.offer.source
        source.commit(PeerId(*pull.puller.key), number, same=True, now_s=now_s)
        pull.sink.status(source.state, now_s)
        self._over(pull)
        self.committed += 1
        pull.source.settle(pull.leg_id)
        pull.puller.pull_ended(pull, pull.sink.may_use)

    def _move_failed(self, pull: Pull) -> None:
        """The transport failed: the next one is tried, as long as there is one."""
        if pull.offer is None or pull.sink.state is not HandoffState.MOVING:
            return
        self.failed += 1
        pull.sink.move_failed()
        self._send_ended(pull, False)
        pull.failures += 1
        if pull.failures < self._attempts:
            self._attempt(pull)
            return
        pull.sink.cancel()
        self._give_up(pull)

    def _give_up(self, pull: Pull) -> None:
        """The sink has aborted: the source is told, and both sides free their blocks."""
        now_s = self._events.now_s
        self._over(pull)
        if not pull.sink.may_free:
            pull.sink.move_failed()
        self._send_ended(pull, False)
        source, offer = pull.source, pull.offer
        if pull.sink.owes_abort and source is not None and offer is not None:
            if source.offers.get(pull.leg_id) is offer:
                offer.source.abort(PeerId(*pull.puller.key), now_s)
                source.settle(pull.leg_id)
            pull.sink.abort_sent()
        pull.puller.pull_ended(pull, False)

    def _send_ended(self, pull: Pull, succeeded: bool) -> None:
        if pull.sending and pull.offer is not None:
            pull.sending = False
            pull.offer.source.send_ended(pull.number, succeeded, self._events.now_s)

    def _lost(self, pull: Pull) -> None:
        if not pull.over:
            self._over(pull)
            pull.puller.pull_ended(pull, False)

    def _over(self, pull: Pull) -> None:
        pull.over = True
        del self._under_way[pull.leg_id]
