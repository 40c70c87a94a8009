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
    """A leg whose KV can be pulled; `blocks` stay put until release.

    The first `ready_blocks` of them are whole: all once the leg is read, less in an offer that grows. `epoch`
    counts the leg's offers from 1; `stands` says that this one was made before, while the leg was read.
    """

    leg_id: LegId
    blocks: tuple[BlockId, ...]
    ready_blocks: int
    epoch: int
    stands: bool
    kv_tokens: int
    cached_tokens: int
    queue_s: float
    compute_s: float

    @property
    def growing(self) -> bool:
        """Whether the leg is still being read."""
        return self.ready_blocks < len(self.blocks)


@dataclass(frozen=True, slots=True)
class GrownLeg:
    """How far a leg is that is read and offered: its first `ready_blocks` blocks are whole."""

    leg_id: LegId
    epoch: int
    ready_blocks: int


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What a step brought; `offered` are read, `grown` are offered and still being read."""

    tokens: tuple[LegToken, ...]
    offered: tuple[OfferedLeg, ...]
    dropped: tuple[DroppedLeg, ...]
    grown: tuple[GrownLeg, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillBacklog:
    """Prompts that a worker has not read: their tokens, and the legs that wait and that run."""

    tokens: int
    waiting_legs: int
    running_legs: int


class LegState(Enum):
    """Where a leg stands.

    RUNNING, GROWING and HANDED legs are being read: not offered yet, offered, and pulled to the last block.
    LEAVING: it is over, but the step in flight still touches its blocks. WITHDRAWN: it is over, but a pull
    may still read them. LEAVING_OFFERED: both.
    """

    # Enum's own hash is Python code, and the table is looked into for every leg.
    __hash__ = object.__hash__

    WAITING = "waiting"
    RUNNING = "running"
    GROWING = "growing"
    HANDED = "handed"
    LEAVING = "leaving"
    LEAVING_OFFERED = "leaving_offered"
    WITHDRAWN = "withdrawn"
    PARKED = "parked"
    ENDED = "ended"


class LegInput(Enum):
    """What can happen to a leg."""

    # Enum's own hash is Python code, and the table is looked into for every leg.
    __hash__ = object.__hash__

    START = "start"
    OFFER = "offer"
    STEP_DONE = "step_done"
    STOP = "stop"
    STOP_IN_FLIGHT = "stop_in_flight"
    PARK = "park"
    FINISH = "finish"
    RELEASE = "release"
    COMMIT = "commit"


LEG_TRANSITIONS = {
    (LegState.WAITING, LegInput.START): LegState.RUNNING,
    (LegState.WAITING, LegInput.STOP): LegState.ENDED,
    (LegState.RUNNING, LegInput.OFFER): LegState.GROWING,
    (LegState.RUNNING, LegInput.STEP_DONE): LegState.RUNNING,
    (LegState.RUNNING, LegInput.STOP): LegState.ENDED,
    (LegState.RUNNING, LegInput.STOP_IN_FLIGHT): LegState.LEAVING,
    (LegState.RUNNING, LegInput.PARK): LegState.PARKED,
    (LegState.RUNNING, LegInput.FINISH): LegState.ENDED,
    (LegState.GROWING, LegInput.STEP_DONE): LegState.GROWING,
    (LegState.GROWING, LegInput.STOP): LegState.WITHDRAWN,
    (LegState.GROWING, LegInput.STOP_IN_FLIGHT): LegState.LEAVING_OFFERED,
    (LegState.GROWING, LegInput.PARK): LegState.PARKED,
    (LegState.GROWING, LegInput.FINISH): LegState.WITHDRAWN,
    (LegState.GROWING, LegInput.RELEASE): LegState.RUNNING,
    (LegState.GROWING, LegInput.COMMIT): LegState.HANDED,
    (LegState.HANDED, LegInput.STOP): LegState.ENDED,
    (LegState.HANDED, LegInput.STOP_IN_FLIGHT): LegState.LEAVING,
    (LegState.HANDED, LegInput.PARK): LegState.ENDED,
    (LegState.HANDED, LegInput.FINISH): LegState.ENDED,
    (LegState.LEAVING, LegInput.STEP_DONE): LegState.ENDED,
    (LegState.LEAVING_OFFERED, LegInput.STEP_DONE): LegState.WITHDRAWN,
    (LegState.LEAVING_OFFERED, LegInput.RELEASE): LegState.LEAVING,
    (LegState.LEAVING_OFFERED, LegInput.COMMIT): LegState.LEAVING,
    (LegState.WITHDRAWN, LegInput.RELEASE): LegState.ENDED,
    (LegState.WITHDRAWN, LegInput.COMMIT): LegState.ENDED,
    (LegState.PARKED, LegInput.RELEASE): LegState.ENDED,
    (LegState.PARKED, LegInput.COMMIT): LegState.ENDED,
}

READING = frozenset({LegState.RUNNING, LegState.GROWING, LegState.HANDED})
"""States of a leg that is being read and wanted."""

STARTED = READING | {LegState.LEAVING, LegState.LEAVING_OFFERED}
"""States of a leg that may be in a step."""

OFFERED = frozenset({LegState.GROWING, LegState.LEAVING_OFFERED, LegState.WITHDRAWN, LegState.PARKED})
"""States in which an offer stands: the blocks are freed by release only."""


@dataclass(slots=True, eq=False)
class LegRecord:
    """What the scheduler knows of a leg.

    `number` is its place in the order of arrival and the key of its sequence. `live` are the samples that are
    still wanted. `table` covers all its tokens once it started; `fresh_blocks` of them were not cached. KV of
    the first `computed` tokens is there, `slice_tokens` more are in the step in flight. `epoch` counts its
    offers. `passed_by` counts the legs that started before it although it was ahead of them.
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
    epoch: int = 0
    started_s: float = 0.0
    passed_by: int = 0

    @property
    def tokens(self) -> int:
        """Tokens to read."""
        return len(self.leg.token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first: higher priority, then earlier arrival."""
        return -self.leg.priority, self.number

    @property
    def output_index(self) -> int:
        """Index in the output of the token that this leg draws."""
        return len(self.leg.token_ids) - self.leg.prompt_tokens

    def ready_blocks(self, block_size: int) -> int:
        """Blocks of the table, from its start, that are whole."""
        return len(self.table) if self.computed == len(self.leg.token_ids) else self.computed // block_size
