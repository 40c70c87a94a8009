"""Pure: a leg at a prefill worker: what comes in, what goes out, and the states in between."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from engine.leg import DroppedLeg, LegToken
from tandem.ids import BlockId, LegId
from tandem.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class PrefillLeg:
    """A prompt to read; see StartPrefill in worker.proto. `deadline_s` is on the worker's monotonic clock."""

    leg_id: LegId
    token_ids: Sequence[int]
    prompt_tokens: int
    sample_indices: tuple[int, ...]
    params: SamplingParams
    priority: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class OfferedLeg:
    """A leg whose KV is parked for a pull; `blocks` stay put until release."""

    leg_id: LegId
    blocks: tuple[BlockId, ...]
    kv_tokens: int
    cached_tokens: int
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What a step brought."""

    tokens: tuple[LegToken, ...]
    offered: tuple[OfferedLeg, ...]
    dropped: tuple[DroppedLeg, ...]


@dataclass(frozen=True, slots=True)
class PrefillBacklog:
    """Prompts that a worker has not read: their tokens, and the legs that wait and that run."""

    tokens: int
    waiting_legs: int
    running_legs: int


class LegState(Enum):
    """Where a leg stands. LEAVING: it is over, but the step in flight still touches its blocks."""

    # Enum\'s own hash is Python code, and the table is looked into for every leg.
    __hash__ = object.__hash__

    WAITING = "waiting"
    RUNNING = "running"
    LEAVING = "leaving"
    PARKED = "parked"
    ENDED = "ended"


class LegInput(Enum):
    """What can happen to a leg."""

    # Enum\'s own hash is Python code, and the table is looked into for every leg.
    __hash__ = object.__hash__

    START = "start"
    STEP_DONE = "step_done"
    STOP = "stop"
    STOP_IN_FLIGHT = "stop_in_flight"
    PARK = "park"
    FINISH = "finish"
    RELEASE = "release"


LEG_TRANSITIONS = {
    (LegState.WAITING, LegInput.START): LegState.RUNNING,
    (LegState.WAITING, LegInput.STOP): LegState.ENDED,
    (LegState.RUNNING, LegInput.STEP_DONE): LegState.RUNNING,
    (LegState.RUNNING, LegInput.STOP): LegState.ENDED,
    (LegState.RUNNING, LegInput.STOP_IN_FLIGHT): LegState.LEAVING,
    (LegState.RUNNING, LegInput.PARK): LegState.PARKED,
    (LegState.RUNNING, LegInput.FINISH): LegState.ENDED,
    (LegState.LEAVING, LegInput.STEP_DONE): LegState.ENDED,
    (LegState.PARKED, LegInput.RELEASE): LegState.ENDED,
}


@dataclass(slots=True, eq=False)
class LegRecord:
    """What the scheduler knows of a leg.

    `number` is its place in the order of arrival and the key of its sequence. `live` are the samples that are
    still wanted. `table` covers all its tokens once it started; `fresh_blocks` of them were not cached. KV of
    the first `computed` tokens is there, `slice_tokens` more are in the step in flight. `passed_by` counts
    the legs that started before it although it was ahead of them.
    """

    leg: PrefillLeg
    number: int
    arrived_s: float
    live: tuple[int, ...]
    state: LegState = LegState.WAITING
    table: tuple[BlockId, ...] = field(default=())
    fresh_blocks: int = 0
    cached_tokens: int = 0
    computed: int = 0
    slice_tokens: int = 0
    started_s: float = 0.0
    passed_by: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first: higher priority, then earlier arrival."""
        return -self.leg.priority, self.number

    @property
    def output_index(self) -> int:
        """Index in the output of the token that this leg draws."""
        return len(self.leg.token_ids) - self.leg.prompt_tokens
