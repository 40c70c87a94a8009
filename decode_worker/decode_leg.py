"""Pure: a leg and its samples at a decode worker: what comes in, what goes out, and the states in between."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from decode_worker.grown_tokens import GrownTokens
from engine.drafting.draft import NO_DRAFT, Draft
from engine.leg import DroppedLeg, LegToken
from engine.leg_bounds import check_pool
from tandem.errors import InvalidRequest, PromptTooLong
from tandem.ids import BlockId, LegId
from tandem.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleStart:
    """Where one sample goes on: its tokens after the leg's shared ones, at least one."""

    sample_index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DecodeLeg:
    """Samples to go on with once the KV of `token_ids` is here; see StartDecode in worker.proto.

    `deadline_s` is on the worker's monotonic clock. In a leg that is fetched early, the samples have no
    tokens and `params` means nothing.
    """

    leg_id: LegId
    token_ids: Sequence[int]
    prompt_tokens: int
    samples: tuple[SampleStart, ...]
    params: SamplingParams
    priority: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks to pull a leg's KV into: its blocks from index `first_block` on; earlier ones were cached."""

    leg_id: LegId
    target_blocks: tuple[BlockId, ...]
    first_block: int
    waited_s: float


@dataclass(frozen=True, slots=True)
class DecodeOutcome:
    """What a step brought; `guesses` were verified in it and `accepted` of them held."""

    tokens: tuple[LegToken, ...]
    dropped: tuple[DroppedLeg, ...]
    guesses: int = 0
    accepted: int = 0


def check_leg(
    leg: DecodeLeg, *, started: bool, max_batch: int, context_tokens: int, pool_tokens: int
) -> None:
    """Raises InvalidRequest for a malformed leg, PromptTooLong if context or pool can never hold it.

    A leg that is `started` needs a token of each sample.
    """
    prompt, shared = leg.prompt_tokens, len(leg.token_ids)
    if not 0 < prompt <= shared:
        raise InvalidRequest(f"{prompt} prompt tokens among {shared}", "prompt_tokens")
    if not leg.samples or not all(bool(start.token_ids) is started for start in leg.samples):
        raise InvalidRequest("a leg needs samples, and each sample a token to go on from", "samples")
    if len(leg.samples) > max_batch:
        raise InvalidRequest(f"{len(leg.samples)} samples in a batch of {max_batch}", "samples")
    longest = shared + max(len(start.token_ids) or 1 for start in leg.samples)
    if longest >= context_tokens:
        raise PromptTooLong(f"{longest} tokens leave no room in a context of {context_tokens}")
    check_pool(longest, pool_tokens)


class LegState(Enum):
    """Where a leg stands.

    LANDED: its KV is here before it was started. ABORTING: it is over, but a pull may still write its blocks.
    """

    # Enum's own hash is Python code, and the table is looked into for every leg.
    __hash__ = object.__hash__

    WAITING = "waiting"
    PULLING = "pulling"
    LANDED = "landed"
    ABORTING = "aborting"
    RUNNING = "running"
    ENDED = "ended"


class LegInput(Enum):
    """What can happen to a leg."""

    # Enum's own hash is Python code, and the table is looked into for every leg.
    __hash__ = object.__hash__

    RESERVE = "reserve"
    START = "start"
    LAND = "land"
    LAND_EARLY = "land_early"
    FAIL = "fail"
    STOP = "stop"
    LAST_SAMPLE_ENDED = "last_sample_ended"


LEG_TRANSITIONS = {
    (LegState.WAITING, LegInput.RESERVE): LegState.PULLING,
    (LegState.WAITING, LegInput.START): LegState.WAITING,
    (LegState.WAITING, LegInput.STOP): LegState.ENDED,
    (LegState.PULLING, LegInput.START): LegState.PULLING,
    (LegState.PULLING, LegInput.LAND): LegState.RUNNING,
    (LegState.PULLING, LegInput.LAND_EARLY): LegState.LANDED,
    (LegState.PULLING, LegInput.FAIL): LegState.ENDED,
    (LegState.PULLING, LegInput.STOP): LegState.ABORTING,
    (LegState.LANDED, LegInput.START): LegState.RUNNING,
    (LegState.LANDED, LegInput.STOP): LegState.ENDED,
    (LegState.ABORTING, LegInput.STOP): LegState.ABORTING,
    (LegState.ABORTING, LegInput.LAND): LegState.ENDED,
    (LegState.ABORTING, LegInput.FAIL): LegState.ENDED,
    (LegState.RUNNING, LegInput.LAST_SAMPLE_ENDED): LegState.ENDED,
}


class SampleState(Enum):
    """Where a sample in the batch stands. LEAVING: it is over, but the step in flight touches its blocks."""

    # Enum's own hash is Python code, and the table is looked into for every leg.
    __hash__ = object.__hash__

    RUNNING = "running"
    LEAVING = "leaving"
    ENDED = "ended"


class SampleInput(Enum):
    """What can happen to a sample in the batch."""

    # Enum's own hash is Python code, and the table is looked into for every leg.
    __hash__ = object.__hash__

    FINISH = "finish"
    STOP = "stop"
    STOP_IN_FLIGHT = "stop_in_flight"
    FINISH_IN_FLIGHT = "finish_in_flight"
    STEP_DONE = "step_done"


SAMPLE_TRANSITIONS = {
    (SampleState.RUNNING, SampleInput.FINISH): SampleState.ENDED,
    (SampleState.RUNNING, SampleInput.STOP): SampleState.ENDED,
    (SampleState.RUNNING, SampleInput.STOP_IN_FLIGHT): SampleState.LEAVING,
    (SampleState.RUNNING, SampleInput.FINISH_IN_FLIGHT): SampleState.LEAVING,
    (SampleState.RUNNING, SampleInput.STEP_DONE): SampleState.RUNNING,
    (SampleState.LEAVING, SampleInput.STOP): SampleState.LEAVING,
    (SampleState.LEAVING, SampleInput.STOP_IN_FLIGHT): SampleState.LEAVING,
    (SampleState.LEAVING, SampleInput.STEP_DONE): SampleState.ENDED,
}


@dataclass(slots=True, eq=False)
class LegRecord:
    """What the scheduler knows of a leg; `number` is its place in the order of arrival.

    `starts` are the samples still wanted before the leg joins, `samples` those in the batch afterwards. A leg
    that is not `started` is fetched early, while its prompt is read.
    `table` holds the leg's blocks while they are pulled, all but the first `cached_blocks` of them.
    """

    leg: DecodeLeg
    number: int
    arrived_s: float
    starts: tuple[SampleStart, ...]
    started: bool = True
    state: LegState = LegState.WAITING
    table: tuple[BlockId, ...] = ()
    cached_blocks: int = 0
    samples: "list[SampleRecord]" = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first: higher priority, then earlier arrival."""
        return -self.leg.priority, self.number

    @property
    def wanted(self) -> bool:
        """Whether the leg still waits for something that somebody wants."""
        if self.state is LegState.RUNNING:
            return any(sample.state is SampleState.RUNNING for sample in self.samples)
        return self.state in (LegState.WAITING, LegState.PULLING, LegState.LANDED)


@dataclass(slots=True, eq=False)
class SampleRecord:
    """A sample in the batch.

    `tokens` are prompt and output; KV of the first `computed` is there, `slice_tokens` more are in the step
    in flight, followed by the guesses of `draft`. `pending_copy` is a copy-on-write (source, target) that
    the next step makes: until then the sample refers to the source besides its table.
    """

    record: LegRecord
    sample_index: int
    key: int
    tokens: list[int] | GrownTokens
    computed: int
    table: list[BlockId]
    state: SampleState = SampleState.RUNNING
    pending_copy: tuple[BlockId, BlockId] | None = None
    slice_tokens: int = 0
    draft: Draft = NO_DRAFT

    @property
    def rank(self) -> tuple[int, int, int]:
        """Lower goes first and is preempted last."""
        return *self.record.rank, self.sample_index

    @property
    def output_index(self) -> int:
        """Index in the output of the next token."""
        return len(self.tokens) - self.record.leg.prompt_tokens

    @property
    def draws(self) -> bool:
        """Whether the next step feeds the sample's last token, so that it draws the next one."""
        return self.computed + self.slice_tokens == len(self.tokens)
