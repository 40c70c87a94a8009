"""A step's tokens travel in one message; several tokens of one sample in one entry."""

from engine.leg import LegToken
from engine.worker_process.worker_service import step_message
from tandem.ids import LegId
from tandem.sampling import FinishReason, TokenLogprob
from tandem.v1 import inference_pb2 as pb


def token(leg: str, sample: int, index: int, finish: FinishReason | None = None) -> LegToken:
    logprob = TokenLogprob(100 + index, -0.5)
    stop = 100 + index if finish is FinishReason.STOP else None
    return LegToken(LegId(leg), sample, index, 100 + index, logprob, finish, stop)


def test_tokens_of_a_sample_stand_together_in_order() -> None:
    tokens = [
        token("a", 0, 3),
        token("a", 0, 4),
        token("a", 0, 5, FinishReason.STOP),
        token("a", 1, 7),
        token("b", 1, 2),
    ]
    entries = step_message(9, tokens, 3, 0.1).step.sequences
    assert [(e.leg_id, e.sample_index, e.first_index, list(e.token_ids)) for e in entries] == [
        ("a", 0, 3, [103, 104, 105]),
        ("a", 1, 7, [107]),
        ("b", 1, 2, [102]),
    ]
    assert [len(entry.logprobs) for entry in entries] == [3, 1, 1]
    assert (entries[0].finish_reason, entries[0].stop_token_id) == (pb.FINISH_REASON_STOP, 105)
    assert not entries[1].HasField("stop_token_id")
