"""Pure: the source's side of one hand-off; it alone says when the blocks may be freed.

Blocks may be freed when the hand-off is over, *and* no I/O of this process reads them, *and* the sink can no
longer touch them: it said so (commit, abort, or a pull with a higher number), or its link broke (the kernel
closes a dead process's sockets after its memory), or its lease and a margin passed.
"""

from enum import Enum
from types import MappingProxyType
from typing import Final

from kvtransfer.contract import HandoffKey, PeerId
from kvtransfer.handoffs.words import HandoffState, ReleaseReason, SourceTimes, lookup
from tandem.errors import ProtocolError


class SourceInput(Enum):
    """What can happen to the source."""

    # Enum's own hash is Python code, and the table is looked into for every leg.
    __hash__ = object.__hash__

    PULL = "pull"
    """A first or higher-numbered pull over a transport where the source sends."""
    PULL_DIRECT = "direct pull"
    """The same over a transport where the sink reads the source's memory."""
    REPEATED_PULL = "repeated pull"
    STRANGE_PULL = "pull of another sink or of an older number"
    SEND_STARTED = "send started"
    SEND_ENDED = "send ended"
    SEND_FAILED = "send failed"
    COMMIT = "commit"
    MISMATCH = "commit with other checksums"
    STALE_COMMIT = "commit of an earlier number"
    ABORT = "abort"
    WITHDRAW = "withdraw"
    SUPERSEDE = "supersede"
    CLOSE = "close"
    PEER_SUSPECTED = "peer suspected dead"
    LINK_LOST = "link lost"
    PARK_PASSED = "park time passed"
    LEASE_PASSED = "lease passed"


class SourceAction(Enum):
    """What the source does about it."""

    GRANT = "grant a lease"
    REGRANT = "repeat the lease"
    REFUSE = "refuse"
    NOTE = "note"
    CLEAR = "the sink touches the blocks no more"
    SHORTEN = "the sink touches nothing; wait a little for its next pull"
    END = "end it; the fence stays"


_S, _I, _A = HandoffState, SourceInput, SourceAction
_Rows = dict[tuple[HandoffState, SourceInput], tuple[SourceAction, HandoffState]]


def _held(state: HandoffState, after_link: HandoffState) -> _Rows:
    """The rows that all states under a lease share."""
    return {
        (state, _I.PULL): (_A.GRANT, _S.ACCEPTED),
        (state, _I.PULL_DIRECT): (_A.GRANT, _S.MOVING),
        (state, _I.REPEATED_PULL): (_A.REGRANT, state),
        (state, _I.STRANGE_PULL): (_A.REFUSE, state),
        (state, _I.COMMIT): (_A.CLEAR, _S.COMMITTED),
        (state, _I.MISMATCH): (_A.SHORTEN, _S.ACCEPTED),
        (state, _I.STALE_COMMIT): (_A.NOTE, state),
        (state, _I.ABORT): (_A.CLEAR, _S.ABORTED),
        (state, _I.WITHDRAW): (_A.END, _S.ABORTED),
        (state, _I.SUPERSEDE): (_A.END, _S.ABORTED),
        (state, _I.CLOSE): (_A.END, _S.ABORTED),
        (state, _I.PEER_SUSPECTED): (_A.END, _S.ABORTED),
        (state, _I.LINK_LOST): (_A.SHORTEN, after_link),
        (state, _I.LEASE_PASSED): (_A.CLEAR, _S.ABORTED),
    }


def _over(state: HandoffState) -> _Rows:
    """The rows of an ended hand-off: whatever comes late changes nothing but the fence."""
    refused = (_I.PULL, _I.PULL_DIRECT, _I.REPEATED_PULL, _I.STRANGE_PULL)
    cleared = (_I.COMMIT, _I.ABORT, _I.LINK_LOST, _I.LEASE_PASSED)
    noted = (
        *(_I.SEND_STARTED, _I.SEND_ENDED, _I.SEND_FAILED),
        *(_I.WITHDRAW, _I.SUPERSEDE, _I.CLOSE, _I.PEER_SUSPECTED),
        *(_I.MISMATCH, _I.STALE_COMMIT),
    )
    return {
        **{(state, given): (_A.REFUSE, state) for given in refused},
        **{(state, given): (_A.CLEAR, state) for given in cleared},
        **{(state, given): (_A.NOTE, state) for given in noted},
    }


TRANSITIONS: Final = MappingProxyType(
    {
        (_S.OFFERED, _I.PULL): (_A.GRANT, _S.ACCEPTED),
        (_S.OFFERED, _I.PULL_DIRECT): (_A.GRANT, _S.MOVING),
        (_S.OFFERED, _I.ABORT): (_A.CLEAR, _S.ABORTED),
        (_S.OFFERED, _I.WITHDRAW): (_A.END, _S.ABORTED),
        (_S.OFFERED, _I.SUPERSEDE): (_A.END, _S.ABORTED),
        (_S.OFFERED, _I.CLOSE): (_A.END, _S.ABORTED),
        (_S.OFFERED, _I.PARK_PASSED): (_A.END, _S.ABORTED),
        **_held(_S.ACCEPTED, after_link=_S.ACCEPTED),
        (_S.ACCEPTED, _I.SEND_STARTED): (_A.NOTE, _S.MOVING),
        (_S.ACCEPTED, _I.SEND_ENDED): (_A.NOTE, _S.LANDED),
        (_S.ACCEPTED, _I.SEND_FAILED): (_A.SHORTEN, _S.ACCEPTED),
        **_held(_S.MOVING, after_link=_S.ACCEPTED),
        (_S.MOVING, _I.SEND_ENDED): (_A.NOTE, _S.LANDED),
        (_S.MOVING, _I.SEND_FAILED): (_A.SHORTEN, _S.ACCEPTED),
        **_held(_S.LANDED, after_link=_S.LANDED),
        **_over(_S.COMMITTED),
        **_over(_S.ABORTED),
    }
)
"""(state, input) -> (action, next state)."""

_REASONS: Final = MappingProxyType(
    {
        _I.COMMIT: ReleaseReason.COMMITTED,
        _I.ABORT: ReleaseReason.ABORTED_BY_SINK,
        _I.WITHDRAW: ReleaseReason.WITHDRAWN,
        _I.SUPERSEDE: ReleaseReason.SUPERSEDED,
        _I.CLOSE: ReleaseReason.CLOSED,
        _I.PEER_SUSPECTED: ReleaseReason.PEER_LOST,
        _I.PARK_PASSED: ReleaseReason.PARK_EXPIRED,
        _I.LEASE_PASSED: ReleaseReason.LEASE_EXPIRED,
    }
)


class SourceHandoff:
    """One offered hand-off. Every `now_s` is the source's monotonic clock and never goes back."""

    def __init__(self, key: HandoffKey, times: SourceTimes, now_s: float) -> None:
        self.key = key
        self.state = HandoffState.OFFERED
        self.holder: PeerId | None = None
        self.number: int | None = None
        self.reason: ReleaseReason | None = None
        self._times = times
        self._deadline_s = now_s + times.park_s
        self._lease_until_s = now_s
        self._forget_at_s = now_s
        self._local_io = 0
        self._peer_may_touch = False
        self._shortened = False
        self._overdue = False

    @property
    def must_stop_sending(self) -> bool:
        """Whether what this process still sends should be stopped.

        A committed transfer's bytes are all there: its send ends by itself, and is given a moment for it.
        """
        return self.state is HandoffState.ABORTED or self._overdue

    @property
    def may_free(self) -> bool:
        """Whether nobody, here or there, touches the blocks or ever will."""
        return self.state.terminal and self._local_io == 0 and not self._peer_may_touch

    @property
    def reads_running(self) -> bool:
        """Whether this process reads the blocks."""
        return self._local_io > 0

    @property
    def next_deadline_s(self) -> float:
        """When `tick` has something to do (or, when it may be freed, when it may be forgotten)."""
        return self._forget_at_s if self.may_free else self._deadline_s

    def lease_left_s(self, now_s: float) -> float:
        """Seconds of the lease that are left: 0 when it passed, however often it is asked for."""
        return max(0.0, self._lease_until_s - now_s)

    def pull(self, sink: PeerId, number: int, direct: bool, now_s: float) -> bool:
        """Whether the sink holds the lease after its pull; `direct` when it reads our memory itself."""
        given = self._classify(sink, number, direct)
        action = self._apply(given, now_s)
        if action is SourceAction.GRANT:
            self.holder, self.number = sink, number
            self._peer_may_touch = direct
            self._shortened = False
            self._lease_until_s = now_s + self._times.lease_s
            self._deadline_s = self._lease_until_s + self._times.margin_s
        return action in (SourceAction.GRANT, SourceAction.REGRANT)

    def send_started(self, number: int, now_s: float) -> None:
        """Our side began to read the blocks for a transfer."""
        self._local_io += 1
        if number == self.number:
            self._apply(SourceInput.SEND_STARTED, now_s)

    def send_ended(self, number: int, succeeded: bool, now_s: float) -> None:
        """Our side stopped reading the blocks for a transfer."""
        self.read_ended()
        if number == self.number:
            self._apply(SourceInput.SEND_ENDED if succeeded else SourceInput.SEND_FAILED, now_s)

    def read_started(self) -> None:
        """Our side reads the blocks for a purpose of its own (checksums)."""
        self._local_io += 1

    def read_ended(self) -> None:
        """It stopped. Raises ProtocolError when nothing was being read."""
        if self._local_io == 0:
            raise ProtocolError("A read of hand-off blocks ended that never started.")
        self._local_io -= 1

    def check_holder(self, sink: PeerId) -> None:
        """Raises ProtocolError unless the sink holds the lease or held it."""
        if sink != self.holder:
            raise ProtocolError("Only the sink that pulled a hand-off can commit it.")

    def commit(self, sink: PeerId, number: int, same: bool, now_s: float) -> None:
        """The sink holds all it wants, `number` being its last transfer; `same` when its copy is ours.

        If not, it may pull again. Raises ProtocolError unless it holds the lease or held it.
        """
        self.check_holder(sink)
        # Between a mismatch and its late copy the sink may have begun to read again.
        current = number == self.number
        given = SourceInput.COMMIT if same else SourceInput.MISMATCH
        self._apply(given if current else SourceInput.STALE_COMMIT, now_s)

    def abort(self, sink: PeerId, now_s: float) -> None:
        """The sink gave up. Raises ProtocolError when another one holds the lease."""
        if self.holder is not None and sink != self.holder:
            raise ProtocolError("Only the sink that pulled a hand-off can abort it.")
        self._apply(SourceInput.ABORT, now_s)

    def end(self, given: SourceInput, now_s: float) -> None:
        """The source's side gives up: WITHDRAW, SUPERSEDE or CLOSE."""
        self._apply(given, now_s)

    def peer_suspected(self, now_s: float) -> None:
        """Somebody says that the holder is dead; without proof its fence stays."""
        self._apply(SourceInput.PEER_SUSPECTED, now_s)

    def grew(self, now_s: float) -> None:
        """More of the offer is ready: the park time begins anew, for nobody can have pulled it all before."""
        if self.state is HandoffState.OFFERED:
            self._deadline_s = now_s + self._times.park_s

    def link_lost(self, now_s: float) -> None:
        """The holder's link broke: it is dead or ended all its reading before it closed the link."""
        self._apply(SourceInput.LINK_LOST, now_s)

    def tick(self, now_s: float) -> None:
        """Lets a passed deadline act; harmless at any time."""
        if now_s < self._deadline_s or self.may_free:
            return
        self._overdue = self.state.terminal
        passed = SourceInput.PARK_PASSED if self.state is HandoffState.OFFERED else SourceInput.LEASE_PASSED
        self._apply(passed, now_s)

    def _classify(self, sink: PeerId, number: int, direct: bool) -> SourceInput:
        if self.number is None or (sink == self.holder and number > self.number):
            return SourceInput.PULL_DIRECT if direct else SourceInput.PULL
        same = sink == self.holder and number == self.number
        # After its link broke, the sink closed that transfer: a late copy of its pull must not revive it.
        return SourceInput.REPEATED_PULL if same and not self._shortened else SourceInput.STRANGE_PULL

    def _apply(self, given: SourceInput, now_s: float) -> SourceAction:
        action, following = lookup(TRANSITIONS, self.state, given)
        ended_now = following.terminal and not self.state.terminal
        self.state = following
        if action in (SourceAction.CLEAR, SourceAction.SHORTEN):
            self._peer_may_touch = False
        if action is SourceAction.SHORTEN:
            self._shortened = True
            self._deadline_s = min(self._deadline_s, now_s + self._times.regrasp_s)
        if ended_now:
            lost = given is SourceInput.LEASE_PASSED and self._shortened
            self.reason = ReleaseReason.PEER_LOST if lost else _REASONS[given]
            self._forget_at_s = now_s + self._times.forget_s
        if following.terminal and (ended_now or action is SourceAction.CLEAR):
            fence_s = self._lease_until_s + self._times.margin_s
            self._deadline_s = fence_s if self._peer_may_touch else now_s + self._times.regrasp_s
        return action
