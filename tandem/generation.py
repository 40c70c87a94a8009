"""Pure: what a client asks for and what it is told, without protobuf or gRPC in sight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from tandem.sampling import FinishReason, TokenLogprob
from tandem.v1 import inference_pb2 as pb
from tandem.wire import FINISH_FROM_WIRE, logprob_from_wire


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; role is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    ids: Sequence[int]


Prompt = str | Sequence[ChatMessage] | TokenPrompt
"""Plain text, a conversation, or token ids."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to sample; None leaves a choice to the server. Meanings and ranges as in inference.proto."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None
    logprobs: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    include_stop: bool | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one sample; `finish` is set in its last one."""

    sample_index: int
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Where the time went, in seconds on the router's clock; see Timeline in inference.proto."""

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
class Update:
    """The news of one response; usage and timeline come with the last one."""

    request_id: str
    deltas: tuple[Delta, ...]
    usage: Usage | None = None
    timeline: Timeline | None = None


def prompt_to_wire(prompt: Prompt, request: pb.GenerateRequest) -> None:
    """Fills the request's `prompt`."""
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, TokenPrompt):
        request.token_ids.ids.extend(prompt.ids)
        request.token_ids.SetInParent()
    else:
        messages = [pb.ChatMessage(role=turn.role, content=turn.content) for turn in prompt]
        request.chat.CopyFrom(pb.ChatPrompt(messages=messages))


def sampling_options_to_wire(options: SamplingOptions) -> pb.SamplingParams:
    """Only what was chosen is set."""
    return pb.SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        repetition_penalty=options.repetition_penalty,
        logit_bias=dict(options.logit_bias),
        stop=options.stop,
        stop_token_ids=options.stop_token_ids,
        seed=options.seed,
        logprobs=options.logprobs,
        n=options.n,
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        ignore_eos=options.ignore_eos,
        include_stop=options.include_stop,
    )


def update_from_wire(message: pb.GenerateResponse) -> Update:
    """Absent usage and timeline become None."""
    return Update(
        message.request_id,
        tuple(_delta(chunk) for chunk in message.chunks),
        _usage(message.usage) if message.HasField("usage") else None,
        _timeline(message.timeline) if message.HasField("timeline") else None,
    )


def _delta(chunk: pb.TokenChunk) -> Delta:
    return Delta(
        chunk.sample_index,
        chunk.first_index,
        tuple(chunk.token_ids),
        chunk.text,
        tuple(map(logprob_from_wire, chunk.logprobs)),
        FINISH_FROM_WIRE.get(chunk.finish_reason),
    )


def _usage(usage: pb.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


def _timeline(line: pb.Timeline) -> Timeline:
    return Timeline(
        line.queue_s,
        line.prefill_s,
        line.handoff_s,
        line.decode_s,
        line.ttft_s,
        line.tpot_s,
        line.longest_gap_s,
        line.prefill_worker,
        line.decode_worker,
        line.transport,
        line.handoff_bytes,
        line.replacements,
        line.slo_met,
        line.slo_missed_by,
    )
