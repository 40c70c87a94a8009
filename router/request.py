"""Pure: what the two front doors ask of the router's core, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.ids import RequestId
from tandem.sampling import FinishReason, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What the client already has of one sample.

    `token_ids` is empty (the tokens before `next_index` are drawn again) or holds all of them.
    """

    sample_index: int
    next_index: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated, tokenised request.

    `arrived_s` is when it reached the router, on the core's clock; `timeout_s` counts from there, None takes
    the router's limit. `internal` marks the router's own canaries, which no user metric counts.
    """

    request_id: RequestId
    token_ids: Sequence[int]
    sampling: SamplingParams
    slo_class: str
    arrived_s: float
    priority: int = 0
    timeout_s: float | None = None
    resume: tuple[ResumePoint, ...] = ()
    internal: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive new tokens of one sample, and the text that became certain with them.

    `finish` is set in the sample's last chunk, which may hold no token.
    """

    sample_index: int
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Counts of a finished request, in tokens; `completion_tokens` over all samples."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TimelineReport:
    """Where a finished request's time went; see Timeline in protos/tandem/v1/inference.proto."""

    queue_s: float
    prefill_s: float
    handoff_s: float
    decode_s: float
    ttft_s: float
    tpot_s: float
    longest_gap_s: float
    prefill_worker: str
    decode_worker: str
    transport: str
    handoff_bytes: int
    replacements: int
    slo_met: bool
    slo_missed_by: str


@dataclass(frozen=True, slots=True)
class GenerationUpdate:
    """The news of a request since the last update; `usage` and `timeline` come with the last one only."""

    chunks: tuple[Chunk, ...]
    usage: TokenUsage | None = None
    timeline: TimelineReport | None = None
