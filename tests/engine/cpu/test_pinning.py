"""Cores: a worker's threads keep to those it is given, and nothing is left of that afterwards."""

import os
import threading
from pathlib import Path

import pytest

from engine.cpu.pinning import check_cores, on_cores
from prefill_worker.service import PrefillWorker
from tandem.errors import ConfigError
from tandem.worker import Role
from tests.e2e.worker_pair import TOKEN, save_tiny_model, worker_config

CORES = sorted(os.sched_getaffinity(0))
NONE = max(CORES) + 1000


def cores_of_threads(ids: set[int]) -> set[frozenset[int]]:
    return {frozenset(os.sched_getaffinity(thread)) for thread in ids}


def thread_ids() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def test_threads_that_start_meanwhile_inherit_the_cores() -> None:
    seen: list[set[int]] = []
    with on_cores(CORES[:1]):
        thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        assert os.sched_getaffinity(0) == {CORES[0]}
    assert seen == [{CORES[0]}]
    assert os.sched_getaffinity(0) == set(CORES)


def test_without_cores_nothing_changes() -> None:
    with on_cores(()):
        assert os.sched_getaffinity(0) == set(CORES)


def test_a_core_that_is_not_to_be_had_is_named_before_anything_changes() -> None:
    with pytest.raises(
        ConfigError, match=rf"cores: {NONE} is not to be had on this machine; allowed: {CORES[0]}"
    ):
        check_cores([CORES[0], NONE])
    with pytest.raises(ConfigError), on_cores([NONE]):
        pytest.fail("the block must not be entered")
    assert os.sched_getaffinity(0) == set(CORES)


async def test_every_thread_of_a_worker_keeps_to_its_cores(tmp_path: Path) -> None:
    config = worker_config(save_tiny_model(tmp_path), Role.PREFILL, cores=(CORES[-1],))
    before = thread_ids()
    async with PrefillWorker.open(config, TOKEN):
        started = thread_ids() - before
        assert started, "the torch thread at least is new"
        assert cores_of_threads(started) == {frozenset({CORES[-1]})}
    assert os.sched_getaffinity(0) == set(CORES)


async def test_a_worker_on_a_missing_core_does_not_start(tmp_path: Path) -> None:
    config = worker_config(save_tiny_model(tmp_path), Role.PREFILL, cores=(NONE,))
    with pytest.raises(ConfigError, match=f"{NONE}"):
        async with PrefillWorker.open(config, TOKEN):
            pytest.fail("the worker must not serve")
