"""The life of a request, step by step."""

import pytest

from engine.leg import DropReason
from router.commands import Cancel, PlaceDecode, PlacePrefill
from router.leg import TRANSITIONS, Input, State, after
from router.request import ResumePoint, TokenUsage
from router.session import Session
from router.worker_key import WorkerKey
from tandem.errors import DeadlineExceeded, NotReady, ProtocolError
from tandem.ids import LegId
from tandem.sampling import FinishReason, SamplingParams
from tests.router.sessions import PROMPT, make_session, worker

P, D, P2, D2 = worker("p"), worker("d"), worker("p2"), worker("d2")


def say(
    session: Session,
    who: WorkerKey,
    leg_id: str,
    index: int,
    *token_ids: int,
    sample: int = 0,
    finish: FinishReason | None = None,
    now_s: float = 1.0,
) -> list[object]:
    return list(session.tokens(who, LegId(leg_id), sample, index, token_ids, (), finish, None, now_s))


def decoding(params: SamplingParams | None = None, **how: int) -> tuple[Session, LegId]:
    """A session whose first leg decodes, with token 0 of each sample."""
    session = make_session(params, **how)  # type: ignore[arg-type]
    (placed,) = session.admit(0.0)
    leg_id = placed.leg_id
    session.prefill_sent(leg_id, P, 0.1)
    for sample in list(session.legs[leg_id].samples):
        say(session, P, leg_id, 0, 5, sample=sample)
    session.kv_offered(P, leg_id, 1, 0)
    session.decode_sent(leg_id, D)
    session.kv_landed(D, leg_id, "shm", 10, 1.5)
    return session, leg_id


def text_and_tokens(session: Session) -> tuple[str, list[int]]:
    update = session.take_update(9.0)
    chunks = update.chunks if update else ()
    return "".join(c.text for c in chunks), [t for c in chunks for t in c.token_ids]


def test_request_walks_the_way_from_received_to_finished() -> None:
    session = make_session()
    states = [session.state]
    (placed,) = session.admit(0.0)
    assert isinstance(placed, PlacePrefill)
    states.append(session.state)
    session.prefill_sent(placed.leg_id, P, 0.5)
    states.append(session.state)
    assert say(session, P, placed.leg_id, 0, 7) == []
    assert list(session.kv_offered(P, placed.leg_id, 1, 2)) == [PlaceDecode(placed.leg_id)]
    states.append(session.state)
    session.decode_sent(placed.leg_id, D)
    assert session.kv_landed(D, placed.leg_id, "tcp", 64, 1.5)
    states.append(session.state)
    say(session, D, placed.leg_id, 1, 8, 9, 10, finish=FinishReason.LENGTH, now_s=2.0)
    states.append(session.state)
    assert states == [
        State.RECEIVED,
        State.ADMITTED,
        State.PREFILLING,
        State.HANDOFF,
        State.DECODING,
        State.FINISHED,
    ]
    update = session.take_update(2.0)
    assert update is not None
    assert update.usage is not None
    assert update.timeline is not None
    assert update.usage == TokenUsage(prompt_tokens=3, completion_tokens=4, cached_tokens=2)
    assert (update.timeline.transport, update.timeline.handoff_bytes) == ("tcp", 64)
    assert session.take_update(3.0) is None


def test_table_names_every_state_before_the_end() -> None:
    assert {state for state, _ in TRANSITIONS} == set(State) - {
        State.FINISHED,
        State.CANCELLED,
        State.FAILED,
    }
    with pytest.raises(ProtocolError, match="KV_LANDED"):
        after(State.PREFILLING, Input.KV_LANDED)


def test_known_indices_are_dropped_and_partly_known_runs_continue() -> None:
    session, leg_id = decoding()
    say(session, D, leg_id, 0, 5, 6)
    say(session, D, leg_id, 0, 9, 9)
    say(session, D, leg_id, 1, 9, 7)
    assert session.samples[0].tokens == [5, 6, 7]


def test_gap_places_the_sample_anew_with_its_tokens_so_far() -> None:
    session, leg_id = decoding()
    say(session, D, leg_id, 1, 6)
    commands = say(session, D, leg_id, 3, 8)
    assert commands[0] == Cancel(D, leg_id)
    assert isinstance(commands[1], PlacePrefill)
    new = session.legs[commands[1].leg_id]
    assert new.token_ids == (*PROMPT, 5, 6)
    assert D in new.avoid
    assert leg_id not in session.legs


def test_news_of_an_old_leg_or_a_wrong_worker_is_ignored() -> None:
    session, leg_id = decoding()
    say(session, P, leg_id, 1, 9)
    say(session, D2, leg_id, 1, 9)
    say(session, D, "leg-77", 1, 9)
    assert not session.dropped(P, leg_id, (), DropReason.OFFER_EXPIRED, "", 2.0)
    assert not session.worker_lost(P, 2.0)
    assert session.samples[0].tokens == [5]
    assert session.state is State.DECODING


def test_lost_prefill_worker_before_token_0_keeps_samples_together() -> None:
    session = make_session(SamplingParams(n=3, max_tokens=4))
    (placed,) = session.admit(0.0)
    session.prefill_sent(placed.leg_id, P, 0.0)
    commands = session.worker_lost(P, 1.0)
    (again,) = commands
    assert isinstance(again, PlacePrefill)
    assert session.legs[again.leg_id].samples == [0, 1, 2]
    assert session.legs[again.leg_id].token_ids == PROMPT


def test_lost_decode_worker_gives_each_unfinished_sample_a_leg_of_its_own() -> None:
    session, leg_id = decoding(SamplingParams(n=3, max_tokens=4))
    say(session, D, leg_id, 1, 6, sample=1)
    say(session, D, leg_id, 1, 1, 2, 3, sample=2, finish=FinishReason.LENGTH)
    session.worker_lost(D, 2.0)
    legs = sorted((leg.samples, leg.token_ids) for leg in session.legs.values())
    assert legs == [([0], (*PROMPT, 5)), ([1], (*PROMPT, 5, 6))]
    assert session.timeline.replacements == 1


def test_dropped_sample_leaves_the_others_where_they_are() -> None:
    session, leg_id = decoding(SamplingParams(n=2, max_tokens=4))
    commands = session.dropped(D, leg_id, (1,), DropReason.PREEMPTED, "", 2.0)
    assert [type(command) for command in commands] == [PlacePrefill]
    assert session.legs[leg_id].samples == [0]
    say(session, D, leg_id, 1, 9, sample=1)
    assert session.samples[1].tokens == [5]


def test_failures_are_bounded_but_preemptions_are_not() -> None:
    session, leg_id = decoding(max_replacements=2)
    for _ in range(10):
        (command,) = session.dropped(D, leg_id, (), DropReason.PREEMPTED, "", 2.0)
        leg_id = advance(session, command.leg_id)
    for _ in range(2):
        (command,) = session.worker_lost(D, 2.0)
        assert isinstance(command, PlacePrefill)
        leg_id = advance(session, command.leg_id)
    session.worker_lost(D, 2.0)
    assert session.state is State.FAILED
    assert isinstance(session.error, NotReady)


def advance(session: Session, leg_id: LegId) -> LegId:
    """Brings a waiting leg to decoding and forgets the token written on the way, to go on for ever."""
    session.prefill_sent(leg_id, P, 2.0)
    known = len(session.legs[leg_id].token_ids) - len(PROMPT)
    say(session, P, leg_id, known, 5)
    session.kv_offered(P, leg_id, 1, 0)
    session.decode_sent(leg_id, D)
    session.kv_landed(D, leg_id, "shm", 0, 2.0)
    session.samples[0].tokens[1:] = []
    return leg_id


def test_full_worker_is_tried_again_after_growing_pauses() -> None:
    session = make_session()
    (placed,) = session.admit(0.0)
    pauses = []
    for _ in range(8):
        session.prefill_sent(placed.leg_id, P, 0.0)
        (placed,) = session.dropped(P, placed.leg_id, (), DropReason.OVERLOADED, "", 10.0)
        pauses.append(round(session.legs[placed.leg_id].not_before_s - 10.0, 3))
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


def test_deadline_at_a_worker_fails_the_request() -> None:
    session, leg_id = decoding()
    session.dropped(D, leg_id, (), DropReason.DEADLINE, "", 2.0)
    assert isinstance(session.error, DeadlineExceeded)


def test_request_too_large_for_two_workers_fails() -> None:
    session = make_session()
    (placed,) = session.admit(0.0)
    session.prefill_sent(placed.leg_id, P, 0.0)
    (again,) = session.dropped(P, placed.leg_id, (), DropReason.TOO_LARGE, "9 blocks", 0.0)
    session.prefill_sent(again.leg_id, P2, 0.0)
    session.dropped(P2, again.leg_id, (), DropReason.TOO_LARGE, "9 blocks", 0.0)
    assert session.state is State.FAILED
    assert "9 blocks" in str(session.error)


def test_cancel_reaches_every_worker_that_may_hold_blocks() -> None:
    session = make_session()
    (placed,) = session.admit(0.0)
    session.prefill_sent(placed.leg_id, P, 0.0)
    say(session, P, placed.leg_id, 0, 5)
    session.kv_offered(P, placed.leg_id, 1, 0)
    session.decode_sent(placed.leg_id, D)
    commands = session.cancel()
    assert sorted(c.worker for c in commands if isinstance(c, Cancel)) == [D, P]
    assert session.cancel() == []


def test_stop_string_ends_the_sample_and_frees_it_at_the_worker() -> None:
    session, leg_id = decoding(SamplingParams(max_tokens=9, stop=("gh",)))
    commands = say(session, D, leg_id, 1, 6, 7, 8)
    assert commands == [Cancel(D, leg_id)]
    assert session.state is State.FINISHED
    text, tokens = text_and_tokens(session)
    assert (text, tokens) == ("f", [5, 6, 7])
    assert session.samples[0].stop_string == "gh"


def test_samples_that_end_with_token_0_need_no_hand_off() -> None:
    session = make_session(SamplingParams(max_tokens=1))
    (placed,) = session.admit(0.0)
    session.prefill_sent(placed.leg_id, P, 0.0)
    say(session, P, placed.leg_id, 0, 5, finish=FinishReason.LENGTH)
    assert session.state is State.FINISHED
    assert session.timeline.report(session.rules.slo, 1.0).decode_worker == ""


def test_offer_before_its_token_is_a_breach_of_protocol() -> None:
    session = make_session()
    (placed,) = session.admit(0.0)
    session.prefill_sent(placed.leg_id, P, 0.0)
    with pytest.raises(ProtocolError, match="before its token"):
        session.kv_offered(P, placed.leg_id, 1, 0)
    commands = session.violated(placed.leg_id, 1.0)
    assert [type(command) for command in commands] == [Cancel, PlacePrefill]


def test_resume_with_tokens_goes_on_without_writing_them_again() -> None:
    session = make_session(resume=(ResumePoint(0, 2, (5, 6)),))
    (placed,) = session.admit(0.0)
    assert session.legs[placed.leg_id].token_ids == (*PROMPT, 5, 6)
    session.prefill_sent(placed.leg_id, P, 0.0)
    say(session, P, placed.leg_id, 2, 7)
    assert text_and_tokens(session) == ("h", [7])


def test_resume_without_tokens_writes_them_again_but_does_not_emit_them() -> None:
    session = make_session(resume=(ResumePoint(0, 2),))
    (placed,) = session.admit(0.0)
    assert session.legs[placed.leg_id].token_ids == PROMPT
    session.prefill_sent(placed.leg_id, P, 0.0)
    say(session, P, placed.leg_id, 0, 5)
    assert session.take_update(1.0) is None
    session.kv_offered(P, placed.leg_id, 1, 0)
    session.decode_sent(placed.leg_id, D)
    session.kv_landed(D, placed.leg_id, "shm", 0, 1.0)
    say(session, D, placed.leg_id, 1, 6, 7, 8, finish=FinishReason.LENGTH)
    update = session.take_update(1.0)
    assert update is not None
    assert (update.chunks[0].first_index, update.chunks[0].token_ids) == (2, (7, 8))


@pytest.mark.parametrize(
    ("tokens", "finish"),
    [((5, 0), FinishReason.STOP), ((5, 6, 7, 8), FinishReason.LENGTH)],
    ids=["end token", "max_tokens"],
)
def test_resume_of_a_finished_sample_only_says_how_it_ended(
    tokens: tuple[int, ...], finish: FinishReason
) -> None:
    session = make_session(resume=(ResumePoint(0, len(tokens), tokens),), end_ids=frozenset({0}))
    assert session.admit(0.0) == []
    assert session.state is State.FINISHED
    update = session.take_update(0.0)
    assert update is not None
    assert update.chunks[0].finish is finish
    assert update.chunks[0].token_ids == ()
    assert update.usage is not None
    assert update.usage.completion_tokens == len(tokens)
