"""Pure: between the messages of protos/ and the dataclasses that the rooms work with."""

from types import MappingProxyType

from tandem.ids import Incarnation, WorkerId
from tandem.sampling import FinishReason, SamplingParams, TokenLogprob
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import worker_pb2 as wpb
from tandem.worker import Role, WorkerRecord

FINISH_TO_WIRE = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}
FINISH_FROM_WIRE = {wire: reason for reason, wire in FINISH_TO_WIRE.items()}

ROLE_TO_WIRE = {
    Role.PREFILL: wpb.ROLE_PREFILL,
    Role.DECODE: wpb.ROLE_DECODE,
    Role.MIXED: wpb.ROLE_MIXED,
}
ROLE_FROM_WIRE = {wire: role for role, wire in ROLE_TO_WIRE.items()}


def sampling_to_wire(params: SamplingParams) -> pb.SamplingParams:
    """Every field filled in."""
    message = pb.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias),
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        seed=params.seed,
        n=params.n,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        include_stop=params.include_stop,
    )
    if params.logprobs is not None:
        message.logprobs = params.logprobs
    if params.max_tokens is not None:
        message.max_tokens = params.max_tokens
    return message


def sampling_from_wire(message: pb.SamplingParams) -> SamplingParams:
    """Absent fields take the defaults of SamplingParams; nothing is validated here."""
    defaults = SamplingParams()
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else defaults.temperature,
        top_p=message.top_p if message.HasField("top_p") else defaults.top_p,
        top_k=message.top_k if message.HasField("top_k") else defaults.top_k,
        min_p=message.min_p if message.HasField("min_p") else defaults.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=(
            message.repetition_penalty
            if message.HasField("repetition_penalty")
            else defaults.repetition_penalty
        ),
        logit_bias=MappingProxyType(dict(message.logit_bias)),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        seed=message.seed,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        n=message.n if message.HasField("n") else defaults.n,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
    )


def logprob_to_wire(entry: TokenLogprob) -> pb.TokenLogprob:
    """Token bytes are left empty; the router, which has the tokenizer, fills them in."""
    top = [pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top]
    return pb.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, top=top)


def logprob_from_wire(message: pb.TokenLogprob) -> TokenLogprob:
    """Drops the token bytes."""
    top = tuple((alternative.token_id, alternative.logprob) for alternative in message.top)
    return TokenLogprob(message.token_id, message.logprob, top)


def address_to_wire(record: WorkerRecord) -> wpb.WorkerAddress:
    """Leaves the role out."""
    return wpb.WorkerAddress(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        address=record.address,
        digest=record.digest,
    )


def address_from_wire(message: wpb.WorkerAddress, role: Role) -> WorkerRecord:
    """The role is the caller's knowledge."""
    return WorkerRecord(
        WorkerId(message.worker_id), Incarnation(message.incarnation), role, message.address, message.digest
    )
