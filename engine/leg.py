"""Pure: what the schedulers of both workers say about legs."""

from dataclasses import dataclass
from enum import Enum

from tandem.ids import LegId
from tandem.sampling import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class LegToken:
    """A token of one sample; `finish` is set when the sample ended with it."""

    leg_id: LegId
    sample_index: int
    output_index: int
    token_id: int
    logprob: TokenLogprob | None
    finish: FinishReason | None
    stop_token_id: int | None


class DropReason(Enum):
    """Why a leg ended unfinished; the router places it anew or fails it."""

    OVERLOADED = "overloaded"
    HANDOFF_FAILED = "handoff_failed"
    PREEMPTED = "preempted"
    OFFER_EXPIRED = "offer_expired"
    DRAINING = "draining"
    TOO_LARGE = "too_large"
    INTERNAL = "internal"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class DroppedLeg:
    """A leg (or, when `sample_indices` is not empty, some samples of it) that ended unfinished."""

    leg_id: LegId
    reason: DropReason
    message: str
    sample_indices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CommunicatorNumbers:
    """NCCL communicators of a worker: open ones, their device memory, opening calls that nobody waits for.

    `wedged` says, in a sentence, why only a restart of the process helps; None while all is well.
    """

    open: int = 0
    bytes: int = 0
    abandoned: int = 0
    wedged: str | None = None


@dataclass(frozen=True, slots=True)
class LoadNumbers:
    """What a scheduler knows of its load; see LoadSnapshot in worker.proto."""

    waiting_prefill_tokens: int
    waiting_legs: int
    running_sequences: int
    parked_legs: int
    total_blocks: int
    free_blocks: int
    allocated_blocks: int
    referenced_blocks: int
