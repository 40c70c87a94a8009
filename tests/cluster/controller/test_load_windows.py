"""Pure: from what routers count since their start to the load of windows."""

from dataclasses import replace

import pytest

from cluster.controller.load_windows import MOST_LENGTHS, LoadWindows, RouterSample, WorkerSample
from planner.control.load_window import RolePlacement
from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role


def worker(name: str, busy_s: float = 0.0, incarnation: int = 1, *, serving: bool = True) -> WorkerSample:
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    return WorkerSample(WorkerId(name), Incarnation(incarnation), role, busy_s, serving)


def sample(
    router_id: str = "r",
    counts: tuple[int, int, int] = (0, 0, 0),
    lengths: tuple[tuple[int, int], ...] = (),
    workers: tuple[WorkerSample, ...] = (worker("p0"), worker("d0")),
) -> RouterSample:
    return RouterSample(router_id, *counts, lengths, workers)


def test_the_first_sample_is_no_window() -> None:
    assert LoadWindows().add(100.0, [sample(counts=(50, 40, 30))]) is None


def test_a_window_counts_what_came_and_how_it_ended_since_the_last_one() -> None:
    windows = LoadWindows()
    windows.add(100.0, [sample(counts=(50, 40, 30))])
    window = windows.add(110.0, [sample(counts=(70, 48, 36), lengths=((10, 20), (30, 40)))])
    assert window is not None
    assert (window.began_s, window.ended_s, window.arrived) == (100.0, 110.0, 20)
    assert window.attainment == 6 / 8
    assert window.lengths == ((10, 20), (30, 40))
    assert window.rate_rps == 2.0
    again = windows.add(120.0, [sample(counts=(70, 48, 36))])
    assert again is not None
    assert (again.arrived, again.attainment, again.lengths) == (0, None, ())


def test_requests_that_came_and_did_not_end_have_the_lengths_of_the_last_ones() -> None:
    windows = LoadWindows()
    windows.add(0.0, [sample()])
    windows.add(10.0, [sample(counts=(5, 5, 5), lengths=((10, 20),))])
    window = windows.add(20.0, [sample(counts=(9, 5, 5))])
    assert window is not None
    assert (window.arrived, window.lengths) == (4, ((10, 20),))


def test_another_life_of_a_router_counts_from_its_start() -> None:
    windows = LoadWindows()
    windows.add(0.0, [sample("old", (500, 500, 400))])
    window = windows.add(10.0, [sample("new", (7, 4, 3))])
    assert window is not None
    assert (window.arrived, window.attainment) == (7, 3 / 4)


def test_a_router_that_did_not_answer_for_a_while_goes_on_where_it_was() -> None:
    windows = LoadWindows()
    windows.add(0.0, [sample("a", (10, 10, 10)), sample("b", (100, 100, 100))])
    windows.add(10.0, [sample("a", (12, 12, 12))])
    window = windows.add(20.0, [sample("a", (13, 13, 13)), sample("b", (104, 104, 104))])
    assert window is not None
    assert window.arrived == 5


def test_busy_is_the_mean_share_of_the_workers_that_serve_now() -> None:
    windows = LoadWindows()
    windows.add(0.0, [sample(workers=(worker("p0", 3.0), worker("d0", 1.0), worker("d1", 1.0)))])
    later = (
        worker("p0", 8.0),
        worker("d0", 3.0, incarnation=2),
        worker("d1", 2.0),
        worker("d2", 9.0, serving=False),
    )
    window = windows.add(10.0, [sample(workers=later)])
    assert window is not None
    assert window.placement == RolePlacement(1, 2)
    assert window.prefill_busy == pytest.approx(0.5)
    assert window.decode_busy == pytest.approx((0.3 + 0.1) / 2)


def test_a_worker_that_several_routers_see_counts_once() -> None:
    windows = LoadWindows()
    windows.add(0.0, [sample("a"), sample("b")])
    seen = sample("b", workers=(worker("p0", 4.0), worker("d0", serving=False)))
    window = windows.add(10.0, [sample("a"), seen])
    assert window is not None
    assert window.placement == RolePlacement(1, 1)
    assert window.prefill_busy == pytest.approx(0.4)


def test_a_clock_that_went_back_begins_anew() -> None:
    windows = LoadWindows()
    windows.add(100.0, [sample(counts=(5, 5, 5))])
    assert windows.add(90.0, [sample(counts=(8, 8, 8))]) is None
    window = windows.add(95.0, [sample(counts=(9, 9, 9))])
    assert window is not None
    assert (window.began_s, window.arrived) == (90.0, 1)


def test_lengths_of_a_window_are_bounded() -> None:
    windows = LoadWindows()
    windows.add(0.0, [sample()])
    many = replace(sample(counts=(1000, 1000, 1000)), lengths=((1, 1),) * 200)
    window = windows.add(10.0, [replace(many, router_id=name) for name in ("r", "s", "t")])
    assert window is not None
    assert len(window.lengths) <= MOST_LENGTHS
