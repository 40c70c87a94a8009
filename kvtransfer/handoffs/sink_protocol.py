"""Pure: the sink's side of one hand-off; it alone says whether the bytes may be used.

They may be used once every piece was all there before its lease ended, and the source said at the commit that
their checksums are its own. A source that can no longer be asked leaves them unverified: they are not used.
"""

from enum import Enum
from types import MappingProxyType
from typing import Final

from kvtransfer.contract import HandoffKey
from kvtransfer.handoffs.words import HandoffState, SinkTimes, lookup
from tandem.errors import ProtocolError


class SinkInput(Enum):
    """What can happen to the sink."""

    # Enum's own hash is Python code, and the table is looked into for every leg.
    __hash__ = object.__hash__

    ASK = "ask"
    GRANTED = "granted"
    STALE_ANSWER = "answer to an earlier pull"
    REFUSED = "refused"
    NOT_READY = "nothing is ready yet"
    UNANSWERED = "pull unanswered"
    MOVE_STARTED = "move started"
    MOVED = "a piece's bytes are here"
    PIECE_HELD = "a piece is here and hashed"
    ALL_HELD = "the last piece is here and hashed"
    MOVE_FAILED = "move failed"
    LEASE_PASSED = "lease passed"
    DEADLINE_PASSED = "deadline passed"
    COMMIT_UNANSWERED = "commit unanswered"
    MISMATCHED = "other checksums than the source's"
    SOURCE_HOLDS = "source still holds"
    SOURCE_COMMITTED = "source committed"
    SOURCE_ABORTED = "source aborted"
    SOURCE_LOST = "source lost"
    CANCEL = "cancel"


class SinkAction(Enum):
    """What the sink does about it."""

    NOTE = "note"
    SEND_PULL = "send a pull"
    HASH = "hash the bytes"
    SEND_COMMIT = "send commit"
    SEND_ABORT = "send abort, once nothing reads the source's blocks here"


_S, _I, _A = HandoffState, SinkInput, SinkAction
_Rows = dict[tuple[HandoffState, SinkInput], tuple[SinkAction, HandoffState]]


def _open(state: HandoffState) -> _Rows:
    """The rows of every state from which the sink can still give up."""
    return {
        (state, _I.STALE_ANSWER): (_A.NOTE, state),
        (state, _I.SOURCE_HOLDS): (_A.NOTE, state),
        (state, _I.CANCEL): (_A.SEND_ABORT, _S.ABORTED),
        (state, _I.DEADLINE_PASSED): (_A.SEND_ABORT, _S.ABORTED),
        (state, _I.SOURCE_ABORTED): (_A.NOTE, _S.ABORTED),
    }


def _over(state: HandoffState) -> _Rows:
    """The rows of an ended hand-off: late news changes nothing."""
    late = (
        *(_I.STALE_ANSWER, _I.REFUSED, _I.NOT_READY, _I.MOVED, _I.PIECE_HELD, _I.ALL_HELD, _I.MOVE_FAILED),
        *(_I.MISMATCHED, _I.SOURCE_HOLDS, _I.SOURCE_COMMITTED, _I.SOURCE_ABORTED, _I.SOURCE_LOST, _I.CANCEL),
    )
    return {(state, given): (_A.NOTE, state) for given in late}


TRANSITIONS: Final = MappingProxyType(
    {
        **_open(_S.OFFERED),
        (_S.OFFERED, _I.ASK): (_A.SEND_PULL, _S.OFFERED),
        (_S.OFFERED, _I.GRANTED): (_A.NOTE, _S.ACCEPTED),
        (_S.OFFERED, _I.NOT_READY): (_A.NOTE, _S.OFFERED),
        (_S.OFFERED, _I.REFUSED): (_A.SEND_ABORT, _S.ABORTED),
        (_S.OFFERED, _I.UNANSWERED): (_A.SEND_ABORT, _S.ABORTED),
        (_S.OFFERED, _I.SOURCE_LOST): (_A.NOTE, _S.ABORTED),
        **_open(_S.ACCEPTED),
        (_S.ACCEPTED, _I.GRANTED): (_A.NOTE, _S.ACCEPTED),
        (_S.ACCEPTED, _I.MOVE_STARTED): (_A.NOTE, _S.MOVING),
        (_S.ACCEPTED, _I.MOVE_FAILED): (_A.NOTE, _S.OFFERED),
        (_S.ACCEPTED, _I.LEASE_PASSED): (_A.SEND_ABORT, _S.ABORTED),
        (_S.ACCEPTED, _I.SOURCE_LOST): (_A.NOTE, _S.ABORTED),
        **_open(_S.MOVING),
        (_S.MOVING, _I.GRANTED): (_A.NOTE, _S.MOVING),
        (_S.MOVING, _I.MOVED): (_A.HASH, _S.MOVING),
        (_S.MOVING, _I.PIECE_HELD): (_A.NOTE, _S.OFFERED),
        (_S.MOVING, _I.ALL_HELD): (_A.SEND_COMMIT, _S.LANDED),
        (_S.MOVING, _I.MOVE_FAILED): (_A.NOTE, _S.OFFERED),
        (_S.MOVING, _I.LEASE_PASSED): (_A.SEND_ABORT, _S.ABORTED),
        (_S.MOVING, _I.SOURCE_LOST): (_A.NOTE, _S.ABORTED),
        **_open(_S.LANDED),
        (_S.LANDED, _I.GRANTED): (_A.NOTE, _S.LANDED),
        (_S.LANDED, _I.SOURCE_HOLDS): (_A.SEND_COMMIT, _S.LANDED),
        (_S.LANDED, _I.SOURCE_COMMITTED): (_A.NOTE, _S.COMMITTED),
        (_S.LANDED, _I.MISMATCHED): (_A.NOTE, _S.OFFERED),
        (_S.LANDED, _I.SOURCE_LOST): (_A.NOTE, _S.ABORTED),
        (_S.LANDED, _I.COMMIT_UNANSWERED): (_A.SEND_ABORT, _S.ABORTED),
        **_over(_S.COMMITTED),
        (_S.COMMITTED, _I.GRANTED): (_A.NOTE, _S.COMMITTED),
        **_over(_S.ABORTED),
        (_S.ABORTED, _I.GRANTED): (_A.SEND_ABORT, _S.ABORTED),
    }
)
"""(state, input) -> (action, next state)."""


class SinkHandoff:
    """One hand-off being pulled. Every `now_s` is the sink's monotonic clock and never goes back."""

    def __init__(self, key: HandoffKey, times: SinkTimes, deadline_s: float) -> None:
        self.key = key
        self.state = HandoffState.OFFERED
        self.number: int | None = None
        self._times = times
        self._deadline_s = deadline_s
        self._answer_until_s = deadline_s
        self._lease_until_s = deadline_s
        self._settle_until_s = deadline_s
        self._answered = False
        self._moved = False
        self._io_running = False
        self._abort_wanted = False

    @property
    def may_use(self) -> bool:
        """Whether the target blocks hold the leg's KV."""
        return self.state is HandoffState.COMMITTED

    @property
    def may_free(self) -> bool:
        """Whether nothing here touches the target blocks and nothing will."""
        return self.state.terminal and not self._io_running

    @property
    def owes_abort(self) -> bool:
        """Whether the source should be told now that we gave up."""
        return self._abort_wanted and not self._io_running

    @property
    def next_deadline_s(self) -> float | None:
        """When `tick` has something to do; None once it is over."""
        own = {
            HandoffState.OFFERED: self._answer_until_s,
            HandoffState.ACCEPTED: self._lease_until_s,
            HandoffState.MOVING: self._deadline_s if self._moved else self._lease_until_s,
            HandoffState.LANDED: self._settle_until_s,
        }.get(self.state)
        return None if own is None else min(own, self._deadline_s)

    def ask(self, number: int, now_s: float) -> None:
        """A pull with a number higher than any before goes out. Raises ProtocolError otherwise."""
        if self.number is not None and number <= self.number:
            raise ProtocolError(f"Transfer number {number} does not follow {self.number}.")
        self._apply(SinkInput.ASK)
        self.number, self._answered, self._moved = number, False, False
        self._answer_until_s = now_s + self._times.answer_s

    def granted(self, number: int, lease_until_s: float) -> None:
        """The source granted a lease, counted on our clock from when the pull was sent."""
        fresh = self._awaits(number)
        # A copy of the answer while the blocks still move; later it is one to a pull that is over.
        again = number == self.number and self.state is not HandoffState.OFFERED
        self._apply(SinkInput.GRANTED if fresh or again else SinkInput.STALE_ANSWER)
        if fresh:
            self._answered = True
            self._lease_until_s = lease_until_s

    def refused(self, number: int) -> None:
        """The source refused a pull."""
        self._apply(SinkInput.REFUSED if self._awaits(number) else SinkInput.STALE_ANSWER)

    def not_ready(self, number: int) -> None:
        """The source keeps the hand-off for us and has nothing (more) to grant yet."""
        awaited = self._awaits(number)
        self._apply(SinkInput.NOT_READY if awaited else SinkInput.STALE_ANSWER)
        if awaited:
            self._answered = True
            self._answer_until_s = self._deadline_s

    def move_started(self) -> None:
        """Something here begins to touch the blocks."""
        self._apply(SinkInput.MOVE_STARTED)
        self._io_running = True

    def moved(self, now_s: float) -> bool:
        """A piece's bytes are here; whether they came within the lease and can be hashed."""
        if self.state is HandoffState.MOVING and now_s >= self._lease_until_s:
            self._io_running = False
            self._apply(SinkInput.LEASE_PASSED)
            return False
        self._moved = True
        action = self._apply(SinkInput.MOVED)
        self._io_running = action is SinkAction.HASH
        return self._io_running

    def held(self, last: bool, now_s: float) -> None:
        """A piece is hashed; `last` when none is left to pull. Raises ProtocolError before it is here."""
        if not self._moved:
            raise ProtocolError("Bytes cannot be hashed before they are here.")
        self._io_running = False
        self._apply(SinkInput.ALL_HELD if last else SinkInput.PIECE_HELD)
        self._answer_until_s = self._deadline_s
        self._settle_until_s = now_s + self._times.settle_s

    def move_failed(self) -> None:
        """The transfer failed and nothing touches the blocks any more."""
        self._io_running = False
        self._apply(SinkInput.MOVE_FAILED)
        self._answer_until_s = self._deadline_s

    def mismatched(self) -> None:
        """The source holds other bytes than we do: some pieces must be pulled again."""
        self._apply(SinkInput.MISMATCHED)
        self._answer_until_s = self._deadline_s

    def status(self, state: HandoffState | None, now_s: float) -> None:
        """The source said where it stands (None: it does not know the hand-off)."""
        if state is HandoffState.COMMITTED:
            self._apply(SinkInput.SOURCE_COMMITTED)
        elif state is None or state is HandoffState.ABORTED:
            self._apply(SinkInput.SOURCE_ABORTED)
        else:
            self._apply(SinkInput.SOURCE_HOLDS)

    def source_lost(self) -> None:
        """The source cannot be reached any more."""
        self._apply(SinkInput.SOURCE_LOST)

    def cancel(self) -> None:
        """The caller gave up, or ran out of transports."""
        self._apply(SinkInput.CANCEL)

    def abort_sent(self) -> None:
        """The source was told once; when that is lost its lease ends the hand-off."""
        self._abort_wanted = False

    def tick(self, now_s: float) -> None:
        """Lets a passed deadline act; harmless at any time."""
        due_s = self.next_deadline_s
        if due_s is None or now_s < due_s:
            return
        self._apply(
            SinkInput.DEADLINE_PASSED
            if now_s >= self._deadline_s
            else {
                HandoffState.OFFERED: SinkInput.UNANSWERED,
                HandoffState.LANDED: SinkInput.COMMIT_UNANSWERED,
            }.get(self.state, SinkInput.LEASE_PASSED)
        )

    def _awaits(self, number: int) -> bool:
        """Whether a pull with this number is out and has no answer yet."""
        return number == self.number and self.state is HandoffState.OFFERED and not self._answered

    def _apply(self, given: SinkInput) -> SinkAction:
        action, self.state = lookup(TRANSITIONS, self.state, given)
        if action is SinkAction.SEND_ABORT:
            self._abort_wanted = True
        return action
