"""Pure: the words of the hand-off protocol, spoken by source_protocol.py and sink_protocol.py.

One leg's KV is OFFERED by its source, ACCEPTED by a sink (which gets a lease), MOVING while bytes are read,
LANDED when they are all there, and COMMITTED or ABORTED in the end. Each side has a machine of its own, made
of one transition table; neither trusts a single message to arrive: every state has a deadline.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from tandem.errors import ProtocolError


class HandoffState(Enum):
    """Where a hand-off stands, as one side sees it."""

    # Enum's own hash is Python code, and the table is looked into for every leg.
    __hash__ = object.__hash__

    OFFERED = "offered"
    ACCEPTED = "accepted"
    MOVING = "moving"
    LANDED = "landed"
    COMMITTED = "committed"
    ABORTED = "aborted"

    @property
    def terminal(self) -> bool:
        """Whether the hand-off is over on this side."""
        return self in (HandoffState.COMMITTED, HandoffState.ABORTED)

    @property
    def held(self) -> bool:
        """Whether a sink holds a lease on the source's blocks."""
        return self in (HandoffState.ACCEPTED, HandoffState.MOVING, HandoffState.LANDED)


class ReleaseReason(Enum):
    """Why a source's blocks came back; the label of a metric."""

    COMMITTED = "committed"
    WITHDRAWN = "withdrawn"
    ABORTED_BY_SINK = "aborted_by_sink"
    SUPERSEDED = "superseded"
    PARK_EXPIRED = "park_expired"
    LEASE_EXPIRED = "lease_expired"
    PEER_LOST = "peer_lost"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class SourceTimes:
    """The source's bounds, in seconds.

    A lease is fenced `margin_s` after its end: by then the sink, which counts from its asking, has stopped.
    When the link to a sink breaks, the sink has `regrasp_s` to pull again over another transport.
    An ended hand-off is remembered for `forget_s` so that late questions get the right answer.
    """

    park_s: float = 30.0
    lease_s: float = 5.0
    margin_s: float = 0.25
    regrasp_s: float = 1.0
    forget_s: float = 30.0


@dataclass(frozen=True, slots=True)
class SinkTimes:
    """The sink's bounds, in seconds: for an answer to a pull, and for the commit to be acknowledged."""

    answer_s: float = 2.0
    settle_s: float = 1.0


InputT = TypeVar("InputT", bound=Enum)
ActionT = TypeVar("ActionT", bound=Enum)
Rows = Mapping[tuple[HandoffState, InputT], tuple[ActionT, HandoffState]]


def lookup(rows: Rows[InputT, ActionT], state: HandoffState, given: InputT) -> tuple[ActionT, HandoffState]:
    """The row for an input in a state. Raises ProtocolError when there is none."""
    row = rows.get((state, given))
    if row is None:
        raise ProtocolError(f"A hand-off that is {state.value} cannot take the input {given.value}.")
    return row
