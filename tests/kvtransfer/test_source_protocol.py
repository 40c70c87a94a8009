"""The source's side of a hand-off, row by row where it matters."""

import itertools

import pytest

from kvtransfer.contract import PeerId
from kvtransfer.handoffs.source_protocol import TRANSITIONS, SourceHandoff, SourceInput
from kvtransfer.handoffs.words import HandoffState, ReleaseReason, SourceTimes
from tandem.errors import ProtocolError
from tandem.ids import Incarnation, WorkerId
from tests.kvtransfer.pair import key

TIMES = SourceTimes(park_s=30.0, lease_s=5.0, margin_s=0.25, regrasp_s=1.0, forget_s=10.0)
SINK = PeerId(WorkerId("decode-0"), Incarnation(1))
OTHER = PeerId(WorkerId("decode-1"), Incarnation(1))
ENDINGS = (SourceInput.WITHDRAW, SourceInput.SUPERSEDE, SourceInput.CLOSE)


def pulled(direct: bool) -> SourceHandoff:
    """A hand-off whose lease began at 0."""
    handoff = SourceHandoff(key("a"), TIMES, 0.0)
    assert handoff.pull(SINK, 1, direct, 0.0)
    return handoff


def test_every_live_state_takes_every_ending() -> None:
    live = [state for state in HandoffState if not state.terminal]
    for state, given in itertools.product(live, ENDINGS):
        assert TRANSITIONS[state, given][1] is HandoffState.ABORTED


def test_no_row_leads_back_from_an_end() -> None:
    for (state, _), (_, following) in TRANSITIONS.items():
        if state.terminal:
            assert following is state


def test_input_without_a_row_is_a_protocol_error() -> None:
    handoff = SourceHandoff(key("a"), TIMES, 0.0)
    with pytest.raises(ProtocolError, match="offered cannot take the input link lost"):
        handoff.link_lost(0.0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_parked_block_is_free_as_soon_as_it_is_withdrawn(ending: SourceInput) -> None:
    handoff = SourceHandoff(key("a"), TIMES, 0.0)
    handoff.end(ending, 1.0)
    assert handoff.may_free


@pytest.mark.parametrize("ending", ENDINGS)
def test_block_is_not_freed_while_peer_may_read(ending: SourceInput) -> None:
    handoff = pulled(direct=True)
    handoff.end(ending, 1.0)
    assert not handoff.may_free
    assert handoff.next_deadline_s == pytest.approx(5.25)
    handoff.tick(5.2)
    assert not handoff.may_free
    handoff.tick(5.25)
    assert handoff.may_free


@pytest.mark.parametrize("proof", ["commit", "abort", "link_lost"])
def test_fence_ends_with_proof_that_the_peer_is_done(proof: str) -> None:
    handoff = pulled(direct=True)
    handoff.end(SourceInput.WITHDRAW, 1.0)
    actions = {
        "commit": lambda: handoff.commit(SINK, 1, True, 1.5),
        "abort": lambda: handoff.abort(SINK, 1.5),
        "link_lost": lambda: handoff.link_lost(1.5),
    }
    actions[proof]()
    assert handoff.may_free
    assert handoff.reason is ReleaseReason.WITHDRAWN


def test_block_is_not_freed_while_it_is_being_sent() -> None:
    handoff = pulled(direct=False)
    handoff.send_started(1, 0.0)
    handoff.commit(SINK, 1, True, 1.0)
    assert not handoff.may_free
    handoff.send_ended(1, True, 1.1)
    assert handoff.may_free


def test_send_that_outlasts_its_commit_is_stopped() -> None:
    handoff = pulled(direct=False)
    handoff.send_started(1, 0.0)
    handoff.commit(SINK, 1, True, 1.0)
    before = handoff.must_stop_sending
    handoff.tick(2.0)
    assert [before, handoff.must_stop_sending] == [False, True]
    handoff.send_ended(1, False, 2.1)
    assert handoff.may_free
    assert handoff.reason is ReleaseReason.COMMITTED


def test_suspicion_ends_a_handoff_but_lifts_no_fence() -> None:
    handoff = pulled(direct=True)
    handoff.peer_suspected(1.0)
    assert handoff.state is HandoffState.ABORTED
    assert not handoff.may_free
    assert handoff.reason is ReleaseReason.PEER_LOST


def test_broken_link_gives_the_sink_a_moment_to_pull_again() -> None:
    handoff = pulled(direct=True)
    handoff.link_lost(1.0)
    assert handoff.state is HandoffState.ACCEPTED
    handoff.tick(1.9)
    assert handoff.pull(SINK, 2, False, 1.9)
    handoff.tick(2.5)
    assert handoff.state is HandoffState.ACCEPTED
    handoff.link_lost(2.5)
    handoff.tick(3.5)
    assert handoff.may_free
    assert handoff.reason is ReleaseReason.PEER_LOST


def test_late_copy_of_a_pull_does_not_revive_a_broken_transfer() -> None:
    handoff = pulled(direct=True)
    handoff.link_lost(1.0)
    assert not handoff.pull(SINK, 1, True, 1.1)
    handoff.end(SourceInput.WITHDRAW, 1.2)
    assert handoff.may_free


def test_repeated_pull_does_not_lengthen_the_lease() -> None:
    handoff = pulled(direct=True)
    assert handoff.pull(SINK, 1, True, 3.0)
    assert handoff.lease_left_s(3.0) == pytest.approx(2.0)
    assert handoff.next_deadline_s == pytest.approx(5.25)


def test_only_the_first_sink_gets_the_lease() -> None:
    handoff = pulled(direct=False)
    assert not handoff.pull(OTHER, 1, False, 0.1)
    with pytest.raises(ProtocolError, match="Only the sink that pulled"):
        handoff.commit(OTHER, 1, True, 0.2)
    with pytest.raises(ProtocolError, match="Only the sink that pulled"):
        handoff.abort(OTHER, 0.2)
    assert handoff.state is HandoffState.ACCEPTED


def test_restarted_sink_is_another_sink() -> None:
    handoff = pulled(direct=False)
    assert not handoff.pull(PeerId(SINK.worker_id, Incarnation(2)), 2, False, 0.1)


def test_older_number_is_refused() -> None:
    handoff = pulled(direct=False)
    assert handoff.pull(SINK, 3, False, 0.1)
    assert not handoff.pull(SINK, 2, False, 0.2)


def test_abort_that_overtakes_its_pull_wins() -> None:
    handoff = SourceHandoff(key("a"), TIMES, 0.0)
    handoff.abort(SINK, 0.1)
    assert handoff.may_free
    assert not handoff.pull(SINK, 1, True, 0.2)
    assert handoff.may_free


def test_commit_after_the_lease_does_not_count() -> None:
    handoff = pulled(direct=False)
    handoff.tick(5.25)
    handoff.commit(SINK, 1, True, 5.3)
    assert handoff.state is HandoffState.ABORTED
    assert handoff.reason is ReleaseReason.LEASE_EXPIRED


def test_send_of_an_earlier_number_does_not_end_the_current_one() -> None:
    handoff = pulled(direct=False)
    handoff.send_started(1, 0.0)
    handoff.pull(SINK, 2, False, 0.1)
    handoff.send_started(2, 0.1)
    handoff.send_ended(1, True, 0.2)
    states = [handoff.state]
    handoff.send_ended(2, True, 0.3)
    assert [*states, handoff.state] == [HandoffState.MOVING, HandoffState.LANDED]


def test_sink_with_other_bytes_keeps_the_lease_for_a_moment_and_frees_nothing() -> None:
    handoff = pulled(direct=True)
    handoff.commit(SINK, 1, False, 1.0)
    assert [handoff.state, handoff.may_free] == [HandoffState.ACCEPTED, False]
    assert handoff.next_deadline_s == pytest.approx(2.0)
    assert not handoff.pull(SINK, 1, True, 1.1)
    assert handoff.pull(SINK, 2, False, 1.2)
    handoff.commit(SINK, 2, True, 1.4)
    handoff.commit(SINK, 2, False, 1.5)
    assert handoff.state is HandoffState.COMMITTED


def test_late_copy_of_a_rejected_commit_lifts_no_fence() -> None:
    handoff = pulled(direct=True)
    handoff.commit(SINK, 1, False, 1.0)
    handoff.pull(SINK, 2, True, 1.1)
    for same in (False, True):
        handoff.commit(SINK, 1, same, 1.2)
    assert handoff.state is HandoffState.MOVING
    handoff.end(SourceInput.WITHDRAW, 1.3)
    assert not handoff.may_free


def test_pull_that_waits_renews_the_lease() -> None:
    handoff = pulled(direct=True)
    assert handoff.pull(SINK, 2, False, 4.0)
    assert handoff.next_deadline_s == pytest.approx(9.25)
    handoff.end(SourceInput.WITHDRAW, 4.1)
    assert handoff.may_free


def test_park_time_begins_anew_while_an_offer_grows() -> None:
    handoff = SourceHandoff(key("a"), TIMES, 0.0)
    handoff.grew(20.0)
    handoff.tick(45.0)
    assert handoff.state is HandoffState.OFFERED
    handoff.tick(50.0)
    assert handoff.reason is ReleaseReason.PARK_EXPIRED
