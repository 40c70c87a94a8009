"""Pure: the hand-offs of one source, and the one place from which blocks go back to their owner."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvtransfer.contract import BlockRange, HandoffKey, KvReady, PeerId, Transfer
from kvtransfer.handoffs.pieces import complete, layer_span, next_piece
from kvtransfer.handoffs.source_protocol import SourceHandoff, SourceInput
from kvtransfer.handoffs.words import HandoffState, ReleaseReason, SourceTimes
from tandem.errors import ProtocolError, TransferFault
from tandem.ids import BlockId, LegId


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """Hand-offs of one source: totals since its start, and two levels of now.

    `parked` wait for a pull; `in_flight` were pulled and their blocks are not back yet.
    """

    offered: int
    committed: int
    aborted: Mapping[ReleaseReason, int]
    refused: Mapping[TransferFault, int]
    parked: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one transfer was granted: the bytes [part_offset, part_offset + part_bytes) of each block."""

    block_range: BlockRange
    blocks: tuple[BlockId, ...]
    part_offset: int
    part_bytes: int

    @property
    def length_bytes(self) -> int:
        """Bytes of all blocks together."""
        return len(self.blocks) * self.part_bytes


@dataclass(frozen=True, slots=True)
class PullAsk:
    """A sink's wish to pull what is ready of a range, or (`wait_s` > 0) to be told when something is."""

    sink: PeerId
    digest: str
    transport: str
    transfer: Transfer
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PullAnswer:
    """The lease, in seconds from now, and what it is on.

    `piece` is None for a pull that only waits, and when nothing is ready yet (`ready` says which).
    """

    lease_s: float
    ready: bool
    piece: Piece | None = None


@dataclass(frozen=True, slots=True)
class CommitAnswer:
    """Where the hand-off stands after a commit (None: unknown), and the transfers to be pulled again."""

    state: HandoffState | None
    mismatched: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FrameExchange:
    """What a sink offers for the blocks of a leg from index `first_block` on; see worker.proto."""

    member: int
    first_block: int
    frames: tuple[BlockId, ...]


@dataclass(slots=True)
class Offer:
    """One offered hand-off; `pieces` by transfer number, None for a pull that came before there was one.

    `transport` names the one of the last grant; `stop_sending` ends what this process sends for it,
    `stop_hashing` what it hashes.
    """

    machine: SourceHandoff
    blocks: tuple[BlockId, ...]
    ready: KvReady
    pieces: dict[int, Piece | None] = field(default_factory=dict)
    transport: str = ""
    stop_sending: Callable[[], object] | None = None
    stop_hashing: Callable[[], object] | None = None
    released: bool = False

    def range_fault(self, part: BlockRange, layers: int) -> str:
        """Why a range cannot be asked for of `layers` layers, as a sentence; empty when it can."""
        first, end = layer_span(part, layers)
        if part.first_block + part.num_blocks <= len(self.blocks) and first < end <= layers:
            return ""
        return f"{part} was asked for; there are {len(self.blocks)} blocks of {layers} layers."

    def next_piece(self, wanted: BlockRange, layers: int, layer_bytes: int) -> Piece | None:
        """The first piece of a range that should move now; None when it is better to wait."""
        ready = self.ready
        if complete(ready, len(self.blocks), layers):
            ready = KvReady(len(self.blocks), layers)
        part = next_piece(wanted, ready, layers, layer_bytes)
        if part is None:
            return None
        first, end = layer_span(part, layers)
        blocks = self.blocks[part.first_block : part.first_block + part.num_blocks]
        return Piece(part, blocks, first * layer_bytes, (end - first) * layer_bytes)


class OfferBook:
    """Owns the offers of a source; `on_released` is called exactly once for each of them."""

    def __init__(self, times: SourceTimes, on_released: Callable[[HandoffKey, ReleaseReason], None]) -> None:
        self._times = times
        self._on_released = on_released
        self._offers: dict[HandoffKey, Offer] = {}
        self._epochs: dict[LegId, int] = {}
        self._offered = 0
        self._ended: Counter[ReleaseReason] = Counter()
        self.refused: Counter[TransferFault] = Counter()

    def add(self, key: HandoffKey, blocks: Sequence[BlockId], ready: KvReady, now_s: float) -> Offer:
        """A new offer supersedes an earlier epoch. Raises ProtocolError for an epoch that is not newer."""
        known = self._epochs.get(key.leg_id)
        if known is not None:
            if key.epoch <= known:
                raise ProtocolError(f"Epoch {key.epoch} of a leg was offered after epoch {known}.")
            self.end(HandoffKey(key.leg_id, known), SourceInput.SUPERSEDE, now_s)
        self._epochs[key.leg_id] = key.epoch
        offer = self._offers[key] = Offer(SourceHandoff(key, self._times, now_s), tuple(blocks), ready)
        self._offered += 1
        return offer

    def get(self, key: HandoffKey) -> Offer | None:
        """The offer, also for a while after it ended."""
        return self._offers.get(key)

    def newest_epoch(self, leg_id: LegId) -> int | None:
        """Epoch of a leg's newest offer."""
        return self._epochs.get(leg_id)

    def held_by(self, sink: PeerId) -> Iterator[Offer]:
        """The offers that a sink pulled; safe to change while they are gone through."""
        return (offer for offer in tuple(self._offers.values()) if offer.machine.holder == sink)

    def end(self, key: HandoffKey, given: SourceInput, now_s: float) -> None:
        """The source's side gives an offer up; harmless when it is unknown."""
        offer = self._offers.get(key)
        if offer is not None:
            offer.machine.end(given, now_s)
            self.settle(offer)

    def end_all(self, now_s: float) -> None:
        """The source closes."""
        for key in tuple(self._offers):
            self.end(key, SourceInput.CLOSE, now_s)

    def settle(self, offer: Offer) -> HandoffState:
        """Carries out what the machine's state means; called after every input."""
        if offer.machine.must_stop_sending and offer.stop_sending is not None:
            offer.stop_sending()
        if offer.machine.state.terminal and offer.stop_hashing is not None:
            offer.stop_hashing()
        if offer.machine.may_free:
            self._release(offer)
        return offer.machine.state

    def tick(self, now_s: float) -> None:
        """Lets passed deadlines act, and forgets what ended long ago."""
        for key, offer in tuple(self._offers.items()):
            if not offer.released:
                offer.machine.tick(now_s)
                self.settle(offer)
            elif now_s >= offer.machine.next_deadline_s:
                del self._offers[key]
                if self._epochs.get(key.leg_id) == key.epoch:
                    del self._epochs[key.leg_id]

    @property
    def next_deadline_s(self) -> float | None:
        """When `tick` has something to do; None when there is no offer."""
        return min((offer.machine.next_deadline_s for offer in self._offers.values()), default=None)

    @property
    def all_released(self) -> bool:
        """Whether no block is out."""
        return all(offer.released for offer in self._offers.values())

    def release_all(self) -> None:
        """Gives back what fences still hold; only when the memory will not be written again."""
        for offer in self._offers.values():
            self._release(offer)
        self._offers.clear()
        self._epochs.clear()

    def counts(self) -> SourceCounts:
        """For metrics."""
        out = [offer for offer in self._offers.values() if not offer.released]
        parked = sum(offer.machine.state is HandoffState.OFFERED for offer in out)
        aborted = dict(self._ended)
        committed = aborted.pop(ReleaseReason.COMMITTED, 0)
        return SourceCounts(self._offered, committed, aborted, dict(self.refused), parked, len(out) - parked)

    def _release(self, offer: Offer) -> None:
        if offer.released:
            return
        offer.released = True
        reason = offer.machine.reason or ReleaseReason.CLOSED
        self._ended[reason] += 1
        self._on_released(offer.machine.key, reason)
