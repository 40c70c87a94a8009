"""Pure: a source, a sink, a network that loses and repeats, and a clock, for tests of the hand-off protocol.

The world moves no bytes: it remembers whether the source's blocks still held the leg's KV while they were
read, and fails at once when they are given back while somebody reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from kvtransfer.contract import HandoffKey, PeerId
from kvtransfer.handoffs.sink_protocol import SinkHandoff
from kvtransfer.handoffs.source_protocol import SourceHandoff, SourceInput
from kvtransfer.handoffs.words import HandoffState, SinkTimes, SourceTimes
from tandem.ids import Incarnation, LegId, WorkerId

KEY = HandoffKey(LegId("leg"), 1)
SINK = PeerId(WorkerId("decode-0"), Incarnation(1))
SOURCE_TIMES = SourceTimes(park_s=30.0, lease_s=5.0, margin_s=0.25, regrasp_s=1.0, forget_s=10.0)
SINK_TIMES = SinkTimes(answer_s=2.0, settle_s=1.0)
DEADLINE_S = 60.0
MAX_PULLS = 6
"""Pulls of a sink, at most: pieces and transports together."""

STOP_S = 0.2
"""Longest time that reading goes on after the lease (below the source's margin)."""


class Kind(Enum):
    """What a message says."""

    PULL = "pull"
    COMMIT = "commit"
    ABORT = "abort"
    QUERY = "query"
    GRANT = "grant"
    REFUSAL = "refusal"
    NOT_READY = "not ready"
    MISMATCH = "mismatch"
    STATUS = "status"


@dataclass(frozen=True, slots=True)
class Message:
    """On its way; `asked_s` is when the pull that it belongs to was sent.

    A commit carries which pieces were whole copies, which is what their checksums would say.
    """

    kind: Kind
    number: int = 0
    direct: bool = False
    asked_s: float = 0.0
    lease_s: float = 0.0
    state: HandoffState | None = None
    good: tuple[bool, ...] = ()

    @property
    def to_source(self) -> bool:
        """Whether the source is its receiver."""
        return self.kind in (Kind.PULL, Kind.COMMIT, Kind.ABORT, Kind.QUERY)


@dataclass(slots=True)
class Reading:
    """Something that reads the source's blocks; `intact` until they are given back meanwhile."""

    number: int
    direct: bool
    intact: bool = True
    must_end_s: float | None = None


@dataclass(slots=True)
class World:
    """Both sides and all that is between them."""

    now_s: float = 0.0
    source: SourceHandoff = field(default_factory=lambda: SourceHandoff(KEY, SOURCE_TIMES, 0.0))
    sink: SinkHandoff = field(default_factory=lambda: SinkHandoff(KEY, SINK_TIMES, DEADLINE_S))
    network: list[Message] = field(default_factory=list)
    source_alive: bool = True
    sink_alive: bool = True
    released: int = 0
    number: int = 0
    direct: bool = False
    asked_s: float = 0.0
    sink_reading: Reading | None = None
    awaiting_check: bool = False
    sends: list[Reading] = field(default_factory=list)
    given: set[int] = field(default_factory=set)
    pieces: int = 1
    ready: int = 1
    answers: dict[int, bool] = field(default_factory=dict)
    landed: list[bool] = field(default_factory=list)
    copy_good: bool = False

    def send(self, message: Message) -> None:
        """Puts a message on its way."""
        self.network.append(message)

    def deliver(self, message: Message) -> None:
        """Gives a message to its receiver, if that lives."""
        if message.to_source and self.source_alive:
            self._to_source(message)
            self.settle()
        elif not message.to_source and self.sink_alive:
            self._to_sink(message)
            self.settle()

    def ask(self, direct: bool) -> None:
        """The sink pulls with a new number."""
        self.number += 1
        self.direct = direct
        self.sink.ask(self.number, self.now_s)
        self.ask_again()

    def ask_again(self) -> None:
        """The sink repeats its last pull."""
        self.send(Message(Kind.PULL, self.number, self.direct, self.now_s))

    def start_reading(self) -> None:
        """The sink begins to read the source's memory (direct) or its own socket."""
        self.sink.move_started()
        self.sink_reading = Reading(self.number, self.direct)

    def end_reading(self, whole: bool) -> None:
        """The sink stops reading; `whole` when all bytes came. Bytes of a silent fault come whole, too."""
        reading = self.sink_reading
        if reading is None:
            return
        self.sink_reading = None
        self.copy_good = reading.intact and (reading.direct or reading.number in self.given)
        if not whole:
            self.sink.move_failed()
        elif self.sink.moved(self.now_s):
            assert reading.intact, "bytes that were given back during the lease were accepted"
            self.awaiting_check = True
        self.settle()

    def check(self) -> None:
        """The sink hashes a piece; only the source can tell what the checksum means."""
        self.awaiting_check = False
        if self.sink.state is HandoffState.MOVING:
            self.landed.append(self.copy_good)
        self.sink.held(len(self.landed) == self.pieces, self.now_s)
        if self.sink.state is HandoffState.LANDED:
            self.send_commit()
        self.settle()

    def send_commit(self) -> None:
        """The sink says what it holds."""
        self.send(Message(Kind.COMMIT, self.number, good=tuple(self.landed)))

    def grow(self) -> None:
        """The source's prefill finishes another piece."""
        self.ready = min(self.pieces, self.ready + 1)

    def start_send(self) -> None:
        """The source begins to send what it granted last."""
        number = self.source.number
        assert number is not None
        self.source.send_started(number, self.now_s)
        self.sends.append(Reading(number, direct=False))

    def end_send(self, succeeded: bool) -> None:
        """A send at the source ends."""
        send = self.sends.pop()
        if succeeded:
            self.given.add(send.number)
        self.source.send_ended(send.number, succeeded, self.now_s)
        self.settle()

    def advance(self, seconds: float) -> None:
        """Time passes, stopping at every deadline on the way."""
        until_s = self.now_s + seconds
        while True:
            due = [moment for moment in self._moments() if self.now_s < moment <= until_s]
            self.now_s = min(due, default=until_s)
            self._pass_time()
            if not due:
                return

    def take_next_step(self, direct: bool) -> None:
        """What happens next when nothing goes wrong, as far as reading; how that ends is not chosen here."""
        if self.network:
            self.deliver(self.network.pop(0))
        elif self.ready <= len(self.landed) < self.pieces:
            self.grow()
        elif self.sink_alive and self.sink.state is HandoffState.OFFERED and self.number < MAX_PULLS:
            self.ask(direct)
        elif self.source_alive and self.source.state is HandoffState.ACCEPTED and not self.sends:
            self.start_send()
        elif self.sink_alive and self.sink.state is HandoffState.ACCEPTED:
            self.start_reading()

    def kill_source(self) -> None:
        """The source's process is gone, its sends with it."""
        self.source_alive = False
        self.sends.clear()

    def kill_sink(self) -> None:
        """The sink's process is gone, its reading with it."""
        self.sink_alive = False
        self.sink_reading = None
        self.awaiting_check = False

    def settle(self) -> None:
        """Does what the machines' states ask for, and checks what must always hold."""
        if self.sink_alive and self.sink.owes_abort:
            self.sink.abort_sent()
            self.send(Message(Kind.ABORT))
        if self.source_alive and self.source.may_free and not self.released:
            self._release()
        if self.sink_alive and self.sink.may_use:
            assert len(self.landed) == self.pieces, "bytes that never came are used"
            assert all(self.landed), "bytes that are not the source's are used"
        if self.sink_alive and self.sink.may_free:
            assert self.sink_reading is None, "target blocks are freed while they are written"

    def _release(self) -> None:
        self.released += 1
        assert not self.sends, "blocks are freed while the source sends them"
        if self.sink_reading is not None and self.sink_reading.direct:
            self.sink_reading.intact = False
            assert not self.sink_alive, "blocks are freed while the sink reads them"

    def _to_source(self, message: Message) -> None:
        if message.kind is Kind.PULL:
            self._answer_pull(message)
            return
        same = all(message.good)
        if message.kind is Kind.COMMIT and not (same or self.source.state.terminal):
            self.send(Message(Kind.MISMATCH, message.number, good=message.good))
        actions: dict[Kind, Callable[[], None]] = {
            Kind.COMMIT: lambda: self.source.commit(SINK, message.number, same, self.now_s),
            Kind.ABORT: lambda: self.source.abort(SINK, self.now_s),
            Kind.QUERY: lambda: None,
        }
        actions[message.kind]()
        self.send(Message(Kind.STATUS, state=self.source.state))

    def _answer_pull(self, message: Message) -> None:
        """A piece, word that there is none yet (the same whenever it is repeated), or a refusal."""
        ready = self.answers.setdefault(message.number, self.ready > len(self.landed))
        granted = self.source.pull(SINK, message.number, message.direct and ready, self.now_s)
        kind = Kind.REFUSAL if not granted else Kind.GRANT if ready else Kind.NOT_READY
        lease_s = self.source.lease_left_s(self.now_s)
        self.send(Message(kind, message.number, asked_s=message.asked_s, lease_s=lease_s))

    def _to_sink(self, message: Message) -> None:
        if message.kind is Kind.GRANT:
            self.sink.granted(message.number, message.asked_s + message.lease_s)
        elif message.kind is Kind.REFUSAL:
            self.sink.refused(message.number)
        elif message.kind is Kind.NOT_READY:
            self.sink.not_ready(message.number)
        elif message.kind is Kind.MISMATCH:
            self._take_back(message)
        else:
            self.sink.status(message.state, self.now_s)

    def _take_back(self, message: Message) -> None:
        """The sink wants the wrong pieces again; an answer to an earlier commit says nothing about these."""
        if self.sink.state is HandoffState.LANDED and message.number == self.number:
            self.sink.mismatched()
            self.landed = [good for good in self.landed if good]

    def _moments(self) -> list[float]:
        moments = [self.source.next_deadline_s] if self.source_alive and not self.released else []
        if self.sink_alive and self.sink.next_deadline_s is not None:
            moments.append(self.sink.next_deadline_s)
        if self.sink_reading is not None and self.sink_reading.must_end_s is not None:
            moments.append(self.sink_reading.must_end_s)
        return moments

    def _pass_time(self) -> None:
        reading = self.sink_reading
        if reading is not None and reading.must_end_s is not None and reading.must_end_s <= self.now_s:
            self.end_reading(whole=False)
        if self.sink_alive:
            self.sink.tick(self.now_s)
            if self.sink.state.terminal and self.sink_reading is not None:
                self.sink_reading.must_end_s = self.sink_reading.must_end_s or self.now_s + STOP_S
        if self.source_alive:
            self.source.tick(self.now_s)
            if self.source.state is HandoffState.ABORTED:
                while self.sends:
                    self.end_send(succeeded=False)
        self.settle()


def end_by_source(world: World, given: SourceInput) -> None:
    """The source's side gives up."""
    world.source.end(given, world.now_s)
    if world.source.state is HandoffState.ABORTED:
        while world.sends:
            world.end_send(succeeded=False)
    world.settle()
