"""Pure: membership through outages of the registry, on a clock that the test turns."""

from cluster.membership_view import MembershipView
from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role, WorkerRecord

GRACE_S = 3.0


def record(name: str, incarnation: int = 1) -> WorkerRecord:
    return WorkerRecord(WorkerId(name), Incarnation(incarnation), Role.PREFILL, "127.0.0.1:1", "digest")


def test_first_observation_is_published_even_when_empty() -> None:
    assert MembershipView(GRACE_S).observed(0.0, "e", []) == ()


def test_same_observation_is_not_published_again() -> None:
    view = MembershipView(GRACE_S)
    assert view.observed(0.0, "e", [record("a")]) == (record("a"),)
    assert view.observed(1.0, "e", [record("a")]) is None


def test_worker_that_lost_its_lease_is_dropped_at_once_when_the_registry_was_there_all_along() -> None:
    view = MembershipView(GRACE_S)
    view.observed(0.0, "e", [record("a"), record("b")])
    assert view.observed(0.3, "e", [record("a")]) == (record("a"),)


def test_nobody_is_dropped_within_the_grace_after_an_outage() -> None:
    view = MembershipView(GRACE_S)
    view.observed(0.0, "e", [record("a"), record("b")])
    view.unreachable()
    assert view.observed(10.0, "e", []) is None
    assert view.observed(11.0, "e", [record("a")]) is None
    assert view.observed(10.0 + GRACE_S, "e", [record("a")]) == (record("a"),)


def test_registry_that_lost_its_data_between_two_polls_gets_the_grace_too() -> None:
    view = MembershipView(GRACE_S)
    view.observed(0.0, "before", [record("a")])
    assert view.observed(0.25, "after", []) is None
    assert view.observed(0.25 + GRACE_S, "after", []) == ()


def test_new_life_is_published_during_the_grace_and_an_old_one_is_not() -> None:
    view = MembershipView(GRACE_S)
    view.observed(0.0, "e", [record("a", 5)])
    view.unreachable()
    assert view.observed(1.0, "e", [record("a", 4)]) is None
    assert view.observed(1.2, "e", [record("a", 6), record("b")]) == (record("a", 6), record("b"))
