"""A transport that failed is left aside, tried again by one pull, and comes back when it works."""

import pytest

from kvtransfer.contract import PeerId
from kvtransfer.handoffs.road_choice import RoadChoice
from tandem.ids import Incarnation, WorkerId

PEER = PeerId(WorkerId("prefill-0"), Incarnation(1))
NAMES = ("cuda_ipc", "shm", "tcp")


def test_preference_holds_while_nothing_fails() -> None:
    assert RoadChoice(1.0, 30.0).order(PEER, NAMES, 0.0) == NAMES


def test_failed_road_comes_last_but_is_never_lost() -> None:
    choice = RoadChoice(1.0, 30.0)
    choice.failed(PEER, "cuda_ipc", 0.0)
    assert choice.order(PEER, NAMES, 0.1) == ("shm", "tcp", "cuda_ipc")
    choice.failed(PEER, "shm", 0.5)
    assert choice.order(PEER, NAMES, 0.6) == ("tcp", "cuda_ipc", "shm")


def test_outage_of_one_pair_is_not_that_of_another() -> None:
    choice = RoadChoice(1.0, 30.0)
    choice.failed(PEER, "cuda_ipc", 0.0)
    assert choice.order(PeerId(PEER.worker_id, Incarnation(2)), NAMES, 0.1) == NAMES


def test_one_pull_tries_a_road_whose_time_has_come_and_the_others_wait_for_it() -> None:
    choice = RoadChoice(1.0, 30.0)
    choice.failed(PEER, "cuda_ipc", 0.0)
    assert choice.order(PEER, NAMES, 1.0) == NAMES
    assert choice.order(PEER, NAMES, 1.1)[0] == "shm"
    choice.worked(PEER, "cuda_ipc")
    assert choice.order(PEER, NAMES, 1.2) == NAMES


def test_trial_without_news_is_given_to_another_pull() -> None:
    choice = RoadChoice(1.0, 30.0)
    choice.failed(PEER, "cuda_ipc", 0.0)
    choice.order(PEER, NAMES, 1.0)
    assert choice.order(PEER, NAMES, 1.9)[0] == "shm"
    assert choice.order(PEER, NAMES, 2.0) == NAMES


def test_pause_doubles_with_every_failed_trial_up_to_the_cap() -> None:
    choice = RoadChoice(1.0, 5.0)
    now_s, pauses = 0.0, []
    choice.failed(PEER, "cuda_ipc", now_s)
    for _ in range(5):
        began_s = now_s
        while choice.order(PEER, NAMES, now_s)[0] != "cuda_ipc":
            now_s += 0.25
        pauses.append(now_s - began_s)
        choice.failed(PEER, "cuda_ipc", now_s)
    assert pauses == pytest.approx([1.0, 2.0, 4.0, 5.0, 5.0])


def test_pulls_that_fail_together_count_once() -> None:
    choice = RoadChoice(1.0, 30.0)
    for _ in range(4):
        choice.failed(PEER, "cuda_ipc", 0.0)
    assert choice.order(PEER, NAMES, 1.0) == NAMES


def test_new_life_of_a_source_starts_clean() -> None:
    choice = RoadChoice(1.0, 30.0)
    choice.failed(PEER, "cuda_ipc", 0.0)
    choice.forget(PEER)
    assert choice.order(PEER, NAMES, 0.0) == NAMES
