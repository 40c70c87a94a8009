"""Pure: the life of one 2-rank NCCL communicator, and which of them are closed when there are too many.

A communicator is opened by a call that may never return and ended by one that may hang, so both are bounded
by somebody else's clock: what overran is left alone, never destroyed, and what was opened too late is
aborted at once (field-notes, "NCCL through CuPy"; nccl #549, #564, #989).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final, Generic, Protocol, TypeVar, runtime_checkable

from tandem.errors import ProtocolError


class CommunicatorState(Enum):
    """Where a communicator stands."""

    FRESH = "fresh"
    """Its unique id is known; nothing was opened."""
    OPENING = "opening"
    READY = "ready"
    ABANDONED = "abandoned"
    """Nobody waits any more for the call that opens it, which still runs."""
    ABORTING = "aborting"
    CLOSED = "closed"
    STUCK = "stuck"
    """Its abort hangs: only the end of the process frees it."""

    @property
    def over(self) -> bool:
        """Whether it will never carry a transfer again."""
        return self not in (CommunicatorState.FRESH, CommunicatorState.OPENING, CommunicatorState.READY)


class CommunicatorInput(Enum):
    """What can happen to a communicator."""

    OPEN = "open"
    OPENED = "opened"
    OPEN_FAILED = "open failed"
    OPEN_OVERDUE = "open overdue"
    END = "end"
    """A call failed, the peer is lost, a transfer was stopped half way, or it is closed for room."""
    ABORTED = "aborted"
    ABORT_OVERDUE = "abort overdue"


class CommunicatorAction(Enum):
    """What is to be done about it."""

    NOTE = "note"
    OPEN = "open it in a thread"
    USE = "let transfers in"
    ABANDON = "leave the opening thread alone"
    ABORT = "abort it in a thread"
    FORGET = "drop what belonged to it"
    RESTART = "keep it for ever and ask for a restart of the process"


_S, _I, _A = CommunicatorState, CommunicatorInput, CommunicatorAction

TRANSITIONS: Final[
    Mapping[tuple[CommunicatorState, CommunicatorInput], tuple[CommunicatorAction, CommunicatorState]]
] = MappingProxyType(
    {
        (_S.FRESH, _I.OPEN): (_A.OPEN, _S.OPENING),
        (_S.FRESH, _I.END): (_A.FORGET, _S.CLOSED),
        (_S.OPENING, _I.OPENED): (_A.USE, _S.READY),
        (_S.OPENING, _I.OPEN_FAILED): (_A.FORGET, _S.CLOSED),
        (_S.OPENING, _I.OPEN_OVERDUE): (_A.ABANDON, _S.ABANDONED),
        (_S.OPENING, _I.END): (_A.ABANDON, _S.ABANDONED),
        (_S.ABANDONED, _I.OPENED): (_A.ABORT, _S.ABORTING),
        (_S.ABANDONED, _I.OPEN_FAILED): (_A.FORGET, _S.CLOSED),
        (_S.ABANDONED, _I.END): (_A.NOTE, _S.ABANDONED),
        (_S.READY, _I.END): (_A.ABORT, _S.ABORTING),
        (_S.ABORTING, _I.ABORTED): (_A.FORGET, _S.CLOSED),
        (_S.ABORTING, _I.ABORT_OVERDUE): (_A.RESTART, _S.STUCK),
        (_S.ABORTING, _I.END): (_A.NOTE, _S.ABORTING),
        (_S.STUCK, _I.ABORTED): (_A.NOTE, _S.STUCK),
        (_S.STUCK, _I.END): (_A.NOTE, _S.STUCK),
        (_S.CLOSED, _I.END): (_A.NOTE, _S.CLOSED),
    }
)
"""(state, input) -> (action, next state)."""


def transition(
    state: CommunicatorState, given: CommunicatorInput
) -> tuple[CommunicatorAction, CommunicatorState]:
    """The row for an input in a state. Raises ProtocolError when there is none."""
    row = TRANSITIONS.get((state, given))
    if row is None:
        raise ProtocolError(f"A communicator that is {state.value} cannot take the input {given.value}.")
    return row


@dataclass(frozen=True, slots=True)
class CommunicatorLimits:
    """Bounds on what NCCL may take.

    `open_s` is for both ranks to meet (a first one loads kernels); `stop_s` for a stopped transfer to leave
    its call by itself; `abort_s` for an abort, after which the process must be restarted. `max_open` bounds
    the communicators of one side of a worker, `max_abandoned` its threads that hang in an opening call.
    `slot_bytes` is half of a communicator's staging memory and the most that one call moves.
    """

    open_s: float = 15.0
    stop_s: float = 0.25
    abort_s: float = 1.0
    max_open: int = 8
    max_abandoned: int = 8
    slot_bytes: int = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class CommunicatorCounts:
    """One side's communicators now; `bytes` of device memory, `wedged` says why a restart is needed."""

    open: int = 0
    bytes: int = 0
    abandoned: int = 0
    wedged: str | None = None

    def plus(self, other: "CommunicatorCounts") -> "CommunicatorCounts":
        """Both together."""
        return CommunicatorCounts(
            self.open + other.open,
            self.bytes + other.bytes,
            self.abandoned + other.abandoned,
            self.wedged or other.wedged,
        )


@runtime_checkable
class HoldsCommunicators(Protocol):
    """A transport that has them."""

    def counts(self) -> CommunicatorCounts:
        """Its communicators now."""
        ...


def counts_of(transports: Iterable[object]) -> CommunicatorCounts:
    """The communicators of all transports that have some."""
    total = CommunicatorCounts()
    for transport in transports:
        if isinstance(transport, HoldsCommunicators):
            total = total.plus(transport.counts())
    return total


KeyT = TypeVar("KeyT")


class LruOrder(Generic[KeyT]):
    """Keys by their last use."""

    def __init__(self) -> None:
        self._order: dict[KeyT, None] = {}

    def __len__(self) -> int:
        return len(self._order)

    def used(self, key: KeyT) -> None:
        """Makes a key the most recently used; adds it when it is new."""
        self._order.pop(key, None)
        self._order[key] = None

    def forget(self, key: KeyT) -> None:
        """Removes a key; idempotent."""
        self._order.pop(key, None)

    def victims(self, limit: int, busy: Collection[KeyT]) -> tuple[KeyT, ...] | None:
        """The least recently used keys whose removal makes room for one more within `limit`.

        None when there is no room, because those that are `busy` are never removed.
        """
        surplus = len(self._order) + 1 - limit
        if surplus <= 0:
            return ()
        idle = [key for key in self._order if key not in busy]
        return tuple(idle[:surplus]) if len(idle) >= surplus else None
