"""Pure: the instructions that put a leg to work at a worker."""

from router.session import Session
from tandem.ids import LegId
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import worker_pb2 as wpb
from tandem.wire import address_to_wire
from tandem.worker import WorkerRecord


def start_prefill(
    session: Session, sampling: pb.SamplingParams, leg_id: LegId, now_s: float
) -> wpb.RouterMessage:
    """Read the leg's tokens."""
    leg = session.legs[leg_id]
    start = wpb.StartPrefill(
        leg_id=leg_id,
        request_id=session.request.request_id,
        token_ids=leg.token_ids,
        prompt_tokens=len(session.request.token_ids),
        sample_indices=leg.samples,
        sampling=sampling,
        priority=session.request.priority,
        remaining_s=max(0.0, session.rules.deadline_s - now_s),
    )
    return wpb.RouterMessage(start_prefill=start)


def prefetch_kv(
    session: Session, leg_id: LegId, source: WorkerRecord | None, now_s: float
) -> wpb.RouterMessage:
    """Fetch the leg's KV from `source` while it is read there."""
    leg = session.legs[leg_id]
    prefetch = wpb.PrefetchKv(
        leg_id=leg_id,
        request_id=session.request.request_id,
        token_ids=leg.token_ids,
        prompt_tokens=len(session.request.token_ids),
        sample_indices=leg.samples,
        priority=session.request.priority,
        remaining_s=max(0.0, session.rules.deadline_s - now_s),
        source=None if source is None else address_to_wire(source),
        epoch=leg.epoch,
    )
    return wpb.RouterMessage(prefetch_kv=prefetch)


def start_decode(
    session: Session, sampling: pb.SamplingParams, leg_id: LegId, source: WorkerRecord | None, now_s: float
) -> wpb.RouterMessage:
    """Fetch the leg's KV from `source` and go on with its samples."""
    leg = session.legs[leg_id]
    prompt_tokens = len(session.request.token_ids)
    known = len(leg.token_ids) - prompt_tokens
    start = wpb.StartDecode(
        leg_id=leg_id,
        request_id=session.request.request_id,
        token_ids=leg.token_ids,
        prompt_tokens=prompt_tokens,
        samples=[
            wpb.SampleStart(sample_index=index, token_ids=session.samples[index].tokens[known:])
            for index in leg.samples
        ],
        sampling=sampling,
        priority=session.request.priority,
        remaining_s=max(0.0, session.rules.deadline_s - now_s),
        source=None if source is None else address_to_wire(source),
        epoch=leg.epoch,
    )
    return wpb.RouterMessage(start_decode=start)
