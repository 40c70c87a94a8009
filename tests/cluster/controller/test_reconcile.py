"""Pure: the steps from the workers that run to those that are wanted."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.controller.reconcile import Health, Roles, Step, next_step
from tandem.ids import WorkerId
from tandem.worker import Role


def workers(prefill: int, decode: int) -> dict[WorkerId, Role]:
    """Like cluster/plan.py names them."""
    names = {WorkerId(f"prefill-{number}"): Role.PREFILL for number in range(prefill)}
    return names | {WorkerId(f"decode-{number}"): Role.DECODE for number in range(decode)}


def step(wanted: Roles, running: Roles, health: Health | None = None, flips: bool = True) -> Step | None:
    return next_step(wanted, running, health or Health(set(running)), interchangeable=flips)


def test_nothing_is_done_when_all_is_as_wanted() -> None:
    assert step(workers(1, 2), workers(1, 2)) is None


def test_a_flip_starts_the_missing_worker_in_the_place_of_the_last_surplus_one() -> None:
    assert step(workers(2, 1), workers(1, 2)) == Step(WorkerId("decode-1"), WorkerId("prefill-1"))


def test_without_interchangeable_places_one_starts_before_the_other_stops() -> None:
    running = workers(1, 2)
    assert step(workers(2, 1), running, flips=False) == Step(start=WorkerId("prefill-1"))
    running |= workers(2, 0)
    assert step(workers(2, 1), running, flips=False) == Step(stop=WorkerId("decode-1"))


def test_without_room_the_other_one_stops_first() -> None:
    health = Health(set(workers(1, 2)), refused=[WorkerId("prefill-1")])
    assert step(workers(2, 1), workers(1, 2), health, flips=False) == Step(stop=WorkerId("decode-1"))


def test_the_last_worker_of_a_role_that_serves_is_not_stopped() -> None:
    health = Health({WorkerId("prefill-0"), WorkerId("decode-1")})
    assert step(workers(2, 1), workers(1, 2), health) is None
    assert step(workers(1, 1), workers(1, 2), health) is None


def test_nobody_stops_while_a_started_worker_does_not_serve_yet() -> None:
    running = workers(2, 3)
    health = Health(set(running) - {WorkerId("prefill-1")}, starting=[WorkerId("prefill-1")])
    assert step(workers(3, 2), running, health) is None
    assert step(workers(2, 2), running, health) is None
    assert step(workers(2, 4), running, health) == Step(start=WorkerId("decode-3"))


sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@given(sizes, sizes, st.booleans(), st.data())
def test_every_role_keeps_a_serving_worker_and_the_end_is_what_is_wanted(
    start: tuple[int, int], end: tuple[int, int], interchangeable: bool, data: st.DataObject
) -> None:
    wanted, running = workers(*end), workers(*start)
    starting: set[WorkerId] = set()
    for _ in range(40):
        comes: bool = data.draw(st.booleans())
        if starting and comes:
            starting.pop()
        serving = set(running) - starting
        taken = next_step(wanted, running, Health(serving, starting), interchangeable=interchangeable)
        if taken is None and not starting:
            break
        if taken is None:
            starting.pop()
            continue
        if taken.stop is not None:
            role = running.pop(taken.stop)
            assert any(running[one] is role for one in serving - {taken.stop})
        if taken.start is not None:
            running[taken.start] = wanted[taken.start]
            starting.add(taken.start)
    assert running == wanted
