"""The sink's side of a hand-off, row by row where it matters."""

import pytest

from kvtransfer.handoffs.sink_protocol import TRANSITIONS, SinkHandoff
from kvtransfer.handoffs.words import HandoffState, SinkTimes
from tandem.errors import ProtocolError
from tests.kvtransfer.pair import key

TIMES = SinkTimes(answer_s=2.0, settle_s=1.0)


def moving() -> SinkHandoff:
    """A hand-off with a lease until 5 whose bytes move."""
    handoff = SinkHandoff(key("a"), TIMES, deadline_s=60.0)
    handoff.ask(1, 0.0)
    handoff.granted(1, 5.0)
    handoff.move_started()
    return handoff


def landed() -> SinkHandoff:
    """A hand-off whose last piece was hashed at 2."""
    handoff = moving()
    assert handoff.moved(2.0)
    handoff.held(True, 2.0)
    return handoff


def test_no_row_leads_back_from_an_end() -> None:
    for (state, _), (_, following) in TRANSITIONS.items():
        if state.terminal:
            assert following is state


def test_unverified_bytes_cannot_be_committed() -> None:
    handoff = moving()
    with pytest.raises(ProtocolError, match="before they are here"):
        handoff.held(True, 1.0)
    with pytest.raises(ProtocolError, match="moving cannot take the input source committed"):
        handoff.status(HandoffState.COMMITTED, 1.0)


def test_bytes_that_came_after_the_lease_do_not_count() -> None:
    handoff = moving()
    assert not handoff.moved(5.0)
    assert handoff.state is HandoffState.ABORTED
    assert handoff.owes_abort


def test_hashing_may_outlast_the_lease() -> None:
    handoff = moving()
    assert handoff.moved(4.9)
    handoff.tick(5.5)
    handoff.held(True, 5.5)
    assert handoff.state is HandoffState.LANDED


def test_lease_that_ends_while_bytes_move_ends_the_handoff_but_frees_nothing_yet() -> None:
    handoff = moving()
    handoff.tick(5.0)
    assert handoff.state is HandoffState.ABORTED
    before = (handoff.may_free, handoff.owes_abort)
    handoff.move_failed()
    assert [before, (handoff.may_free, handoff.owes_abort)] == [(False, False), (True, True)]


def test_failed_transfer_is_tried_again_under_a_higher_number() -> None:
    handoff = moving()
    handoff.move_failed()
    assert handoff.next_deadline_s == pytest.approx(60.0)
    with pytest.raises(ProtocolError, match="does not follow"):
        handoff.ask(1, 1.0)
    handoff.ask(2, 1.0)
    handoff.granted(1, 9.0)
    assert handoff.next_deadline_s == pytest.approx(3.0)
    handoff.granted(2, 6.0)
    assert handoff.next_deadline_s == pytest.approx(6.0)


def test_second_answer_does_not_lengthen_the_lease() -> None:
    handoff = moving()
    handoff.granted(1, 9.0)
    assert handoff.next_deadline_s == pytest.approx(5.0)


def test_unanswered_pull_is_given_up() -> None:
    handoff = SinkHandoff(key("a"), TIMES, deadline_s=60.0)
    handoff.ask(1, 0.0)
    states = []
    for now_s in (1.9, 2.0):
        handoff.tick(now_s)
        states.append(handoff.state)
    assert states == [HandoffState.OFFERED, HandoffState.ABORTED]
    assert handoff.owes_abort


def test_bytes_may_be_used_once_the_source_agrees() -> None:
    handoff = landed()
    assert not handoff.may_use
    handoff.status(HandoffState.COMMITTED, 2.1)
    assert handoff.may_use


@pytest.mark.parametrize("answer", [HandoffState.ABORTED, None])
def test_source_that_had_given_up_wins_over_bytes_that_are_here(answer: HandoffState | None) -> None:
    handoff = landed()
    handoff.status(answer, 2.1)
    assert handoff.state is HandoffState.ABORTED
    assert not handoff.may_use


def test_bytes_that_nobody_verified_are_not_used() -> None:
    silent, dead = landed(), landed()
    silent.tick(3.0)
    dead.source_lost()
    for handoff in (silent, dead):
        assert handoff.state is HandoffState.ABORTED
        assert not handoff.may_use
    assert [silent.owes_abort, dead.owes_abort] == [True, False]


def test_pieces_are_pulled_one_after_the_other_and_committed_together() -> None:
    handoff = moving()
    assert handoff.moved(2.0)
    handoff.held(False, 2.0)
    states = [handoff.state]
    with pytest.raises(ProtocolError, match="offered cannot take the input source committed"):
        handoff.status(HandoffState.COMMITTED, 2.0)
    handoff.ask(2, 20.0)
    handoff.not_ready(2)
    assert handoff.next_deadline_s == pytest.approx(60.0)
    handoff.ask(3, 30.0)
    handoff.granted(3, 35.0)
    handoff.move_started()
    with pytest.raises(ProtocolError, match="before they are here"):
        handoff.held(True, 31.0)
    assert handoff.moved(31.0)
    handoff.held(True, 31.0)
    assert [*states, handoff.state] == [HandoffState.OFFERED, HandoffState.LANDED]


def test_pieces_that_the_source_holds_otherwise_are_pulled_again() -> None:
    handoff = landed()
    handoff.mismatched()
    assert [handoff.state, handoff.may_use] == [HandoffState.OFFERED, False]
    handoff.ask(2, 2.5)
    handoff.granted(2, 7.0)
    handoff.move_started()
    assert handoff.state is HandoffState.MOVING


def test_source_that_still_holds_is_told_again() -> None:
    handoff = landed()
    handoff.status(HandoffState.MOVING, 2.1)
    assert handoff.state is HandoffState.LANDED
    assert handoff.next_deadline_s == pytest.approx(3.0)


def test_grant_that_comes_after_the_end_is_given_back() -> None:
    handoff = SinkHandoff(key("a"), TIMES, deadline_s=60.0)
    handoff.ask(1, 0.0)
    handoff.cancel()
    handoff.abort_sent()
    handoff.granted(1, 5.0)
    assert handoff.owes_abort


def test_deadline_of_the_request_ends_every_wait() -> None:
    for state in ("offered", "moving", "landed"):
        handoff = {"offered": SinkHandoff(key("a"), TIMES, 60.0), "moving": moving(), "landed": landed()}[
            state
        ]
        handoff.tick(60.0)
        assert handoff.state is HandoffState.ABORTED


def test_second_answer_to_a_pull_that_is_over_changes_nothing() -> None:
    handoff = moving()
    assert handoff.moved(2.0)
    handoff.held(False, 2.0)
    handoff.granted(1, 9.0)
    handoff.refused(1)
    handoff.not_ready(1)
    assert handoff.state is HandoffState.OFFERED
