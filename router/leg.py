"""Pure: the states of a request and of its legs, the one table of their transitions, and what a leg is.

A leg is a stay of some samples at one prefill/decode pair. It walks the middle part of a request's way; the
request itself is where its least advanced leg is, until it ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from engine.transitions import next_state
from router.worker_key import WorkerKey
from tandem.ids import LegId


class State(Enum):
    """Where a request or a leg is."""

    # Enum's own hash is Python code, and the table is looked into for every token.
    __hash__ = object.__hash__

    RECEIVED = "received"
    ADMITTED = "admitted"
    PREFILLING = "prefilling"
    HANDOFF = "handoff"
    DECODING = "decoding"
    MIGRATING = "migrating"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Input(Enum):
    """What can happen to a request or a leg."""

    __hash__ = object.__hash__

    ADMIT = "admit"
    PREFILL_SENT = "prefill sent"
    TOKENS = "tokens"
    KV_GROWING = "kv growing"
    PREFETCH_SENT = "prefetch sent"
    PREFETCH_LOST = "prefetch lost"
    KV_OFFERED = "kv offered"
    DECODE_SENT = "decode sent"
    KV_LANDED = "kv landed"
    PLACE_ANEW = "place anew"
    ALL_ENDED = "all samples ended"
    CANCEL = "cancel"
    FAIL = "fail"


ENDED = frozenset({State.FINISHED, State.CANCELLED, State.FAILED})
"""States that nothing leaves."""

WAY = (State.RECEIVED, State.ADMITTED, State.PREFILLING, State.HANDOFF, State.DECODING, State.MIGRATING)
"""The states before the end, in the order of the way of a request."""


def _table() -> Mapping[tuple[State, Input], State]:
    steps = {
        (State.RECEIVED, Input.ADMIT): State.ADMITTED,
        (State.ADMITTED, Input.PREFILL_SENT): State.PREFILLING,
        (State.PREFILLING, Input.TOKENS): State.PREFILLING,
        (State.PREFILLING, Input.KV_GROWING): State.PREFILLING,
        (State.PREFILLING, Input.PREFETCH_SENT): State.PREFILLING,
        (State.PREFILLING, Input.PREFETCH_LOST): State.PREFILLING,
        (State.PREFILLING, Input.KV_OFFERED): State.HANDOFF,
        (State.HANDOFF, Input.DECODE_SENT): State.HANDOFF,
        (State.HANDOFF, Input.KV_LANDED): State.DECODING,
        (State.DECODING, Input.TOKENS): State.DECODING,
        (State.PREFILLING, Input.PLACE_ANEW): State.ADMITTED,
        (State.HANDOFF, Input.PLACE_ANEW): State.ADMITTED,
        (State.DECODING, Input.PLACE_ANEW): State.ADMITTED,
    }
    for state in WAY[1:]:
        steps[state, Input.ALL_ENDED] = State.FINISHED
    for state in WAY:
        steps[state, Input.CANCEL] = State.CANCELLED
        steps[state, Input.FAIL] = State.FAILED
    return MappingProxyType(steps)


TRANSITIONS = _table()
"""(state, input) -> next state; what has no row is a ProtocolError. MIGRATING is reserved."""


def after(state: State, happened: Input) -> State:
    """The next state. Raises ProtocolError when the table has no row for it."""
    return next_state(TRANSITIONS, state, happened)


@dataclass(slots=True)
class Leg:
    """A stay of some samples at a prefill/decode pair.

    `token_ids` is the prompt and, in a leg that was placed anew, the tokens its one sample had by then.
    `samples` are those still unfinished. `avoid` are workers that failed it before; `not_before_s` delays the
    next placement. `epoch` and `cached_tokens` come with the offer. While the leg is read, `decode` is the
    worker that fetches its KV early.
    """

    leg_id: LegId
    token_ids: Sequence[int]
    samples: list[int]
    waiting_since_s: float
    avoid: frozenset[WorkerKey] = frozenset()
    not_before_s: float = 0.0
    state: State = State.ADMITTED
    prefill: WorkerKey | None = None
    decode: WorkerKey | None = None
    epoch: int = 0
    cached_tokens: int = 0

    def moved(self, happened: Input) -> None:
        """Takes the step of the table. Raises ProtocolError."""
        self.state = after(self.state, happened)

    def speaks(self, worker: WorkerKey) -> bool:
        """Whether news of this leg from that worker is current: it is the one at work now."""
        if self.state is State.PREFILLING:
            return worker == self.prefill
        if self.state is State.HANDOFF:
            return worker in (self.prefill, self.decode)
        return self.state is State.DECODING and worker == self.decode

    def workers(self) -> tuple[WorkerKey, ...]:
        """Workers that may hold blocks of this leg now."""
        holding = {
            State.PREFILLING: {self.prefill, self.decode},
            State.HANDOFF: {self.prefill, self.decode},
            State.DECODING: {self.decode},
        }
        return tuple([worker for worker in holding.get(self.state, ()) if worker is not None])
