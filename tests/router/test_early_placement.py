"""The decode worker is chosen while the prompt is read if one has room; nothing hangs on it."""

from engine.leg import DropReason
from router.commands import Cancel, PlaceDecode, PlacePrefetch, PlacePrefill, SendDecode
from router.leg import State
from router.session import Session
from tandem.ids import LegId
from tandem.sampling import FinishReason, SamplingParams
from tandem.worker import Role
from tests.router.sessions import make_session, worker
from tests.router.test_placement import WINDOWS, leg, placement
from tests.router.test_session import D, P, say


def fetching(samples: int = 1) -> tuple[Session, LegId]:
    """A session whose leg is read at P and fetched at D meanwhile."""
    session = make_session(SamplingParams(n=samples, max_tokens=4))
    (placed,) = session.admit(0.0)
    session.prefill_sent(placed.leg_id, P, 0.1)
    assert session.kv_growing(P, placed.leg_id, 1) == (PlacePrefetch(placed.leg_id),)
    session.prefetch_sent(placed.leg_id, D)
    return session, placed.leg_id


def test_the_leg_goes_on_where_its_kv_is_fetched_already() -> None:
    session, leg_id = fetching()
    assert session.state is State.PREFILLING
    assert say(session, P, leg_id, 0, 7) == []
    assert session.kv_offered(P, leg_id, 1, 0) == (SendDecode(leg_id, D),)
    session.decode_sent(leg_id, D)
    assert session.kv_landed(D, leg_id, "tcp", 10, 2.0)
    assert session.legs[leg_id].state is State.DECODING


def test_a_lost_fetch_leaves_the_choice_open_and_the_leg_alone() -> None:
    session, leg_id = fetching()
    assert session.prefetch_lost(D, leg_id)
    assert not session.prefetch_lost(D, leg_id)
    say(session, P, leg_id, 0, 7)
    assert session.kv_offered(P, leg_id, 1, 0) == (PlaceDecode(leg_id),)


def test_the_death_of_the_fetching_worker_costs_nothing_before_the_first_token() -> None:
    session, leg_id = fetching()
    assert session.worker_lost(D, 1.0) == []
    assert session.timeline.replacements == 0
    say(session, P, leg_id, 0, 7)
    assert session.kv_offered(P, leg_id, 2, 0) == (PlaceDecode(leg_id),)


def test_an_offer_that_was_made_anew_ends_the_fetch_of_the_old_one() -> None:
    session, leg_id = fetching()
    say(session, P, leg_id, 0, 7)
    assert session.kv_offered(P, leg_id, 2, 0) == (Cancel(D, leg_id), PlaceDecode(leg_id))


def test_whatever_ends_the_leg_while_it_is_read_ends_the_fetch() -> None:
    session, leg_id = fetching()
    assert set(session.cancel()) == {Cancel(P, leg_id), Cancel(D, leg_id)}
    session, leg_id = fetching()
    assert say(session, P, leg_id, 0, 7, finish=FinishReason.STOP) == [Cancel(D, leg_id)]
    session, leg_id = fetching()
    cancelled, placed = session.dropped(P, leg_id, (), DropReason.PREEMPTED, "", 1.0)
    assert cancelled == Cancel(D, leg_id)
    assert isinstance(placed, PlacePrefill)
    session, leg_id = fetching()
    assert Cancel(D, leg_id) in session.worker_lost(P, 1.0)


def test_samples_that_end_with_their_first_token_do_not_end_the_fetch_of_the_others() -> None:
    session, leg_id = fetching(samples=2)
    assert say(session, P, leg_id, 0, 7, sample=0, finish=FinishReason.STOP) == []
    assert say(session, P, leg_id, 0, 8, sample=1) == []
    assert session.kv_offered(P, leg_id, 1, 0) == (SendDecode(leg_id, D),)
    assert session.legs[leg_id].samples == [1]


def test_tokens_of_a_worker_that_only_fetches_are_ignored() -> None:
    session, leg_id = fetching()
    assert say(session, D, leg_id, 0, 7) == []
    assert session.samples[0].tokens == []


def test_no_leg_that_is_read_waits_for_one_that_is_not() -> None:
    made = placement(("d", Role.DECODE))
    for number in range(WINDOWS.decode_legs):
        made.wait_for_decode(leg(f"read {number}"))
        assert made.next_decode() is not None
    made.wait_for_decode(leg("waits"))
    assert made.place_prefetch(leg("early")) is None


def test_an_early_fetch_takes_no_turn_of_those_that_are_read() -> None:
    made = placement(("d", Role.DECODE))
    for number in range(WINDOWS.decode_legs):
        assert made.place_prefetch(leg(f"early {number}")) == worker("d")
    assert made.place_prefetch(leg("too many")) is None
    made.wait_for_decode(leg("read"))
    assert made.next_decode() == (LegId("read"), worker("d"))
    assert made.loads[worker("d")].prefetching_legs == WINDOWS.decode_legs
    made.start_prefetched(LegId("early 0"), worker("d"))
    made.prefetch_lost(LegId("early 1"), worker("d"))
    assert made.loads[worker("d")].prefetching_legs == 0
    assert made.loads[worker("d")].fetching_legs == 2


def test_a_worker_without_room_to_grow_fetches_nothing_early() -> None:
    made = placement(("d", Role.DECODE))
    assert made.place_prefetch(leg("large", tokens=4 * 101)) is None
