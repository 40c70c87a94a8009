"""The request log: a line for each request that ended, bounded, and read back as a workload."""

import asyncio
import json
import stat
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from planner.simulate.file import SimFile
from planner.simulate.run import workload_of
from router.ended_request import EndedRequest
from router.request_log import RequestLog, request_log
from router.rotating_file import RotatingFile
from tandem.errors import ConfigError
from tests.planner.test_simulate_command import GOOD
from tests.router.harness import cluster
from tests.router.test_request_end import SLOW, question

ENDED = EndedRequest(2.5, 30, 4, "chat", "finished", 0.25, 0.01)


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_a_routers_log_is_read_back_as_a_workload(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    began_s = time.time()
    async with cluster(folder, SLOW, canary_interval_s=0.2, request_log=path) as running:
        await running.ask(question("one", 4))
        await running.ask(question("two", 7))
        with pytest.raises(grpc.aio.AioRpcError):
            await running.ask(question("late", 200, timeout_s=0.3))
    first, second, late = entries(path)
    assert (first["prompt_tokens"], first["output_tokens"], first["outcome"]) == (3, 4, "finished")
    assert 0 < first["ttft_s"] < 10
    assert (second["slo_class"], late["outcome"]) == ("chat", "DeadlineExceeded")
    assert began_s <= first["arrival_s"] <= second["arrival_s"] <= time.time()

    asked = {"trace": path.name, "arrivals": "trace"}
    file = SimFile.model_validate({**GOOD, "workload": asked})
    workload = list(workload_of(file, tmp_path))
    assert [(one.prompt_tokens, one.output_tokens) for one in workload[:2]] == [(3, 4), (3, 7)]
    assert workload[0].at_s == 0
    assert workload[1].at_s == pytest.approx(second["arrival_s"] - first["arrival_s"])


async def test_requests_refused_at_the_door_are_offered_load_too(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    async with cluster(folder, SLOW, max_active=1, max_queued=1, request_log=path) as running:
        asks = [running.ask(question(f"r{number}", 20)) for number in range(3)]
        await asyncio.gather(*asks, return_exceptions=True)
    outcomes = sorted(entry["outcome"] for entry in entries(path))
    assert outcomes == ["Overloaded", "finished", "finished"]


def test_a_full_file_is_set_aside_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with RotatingFile(path, most_bytes=8, kept=2) as file:
        for number in range(4):
            file.append([f"{number}a\n".encode(), f"{number}b\n".encode()])
    with RotatingFile(path, most_bytes=8, kept=2) as file:
        file.append([b"4a\n", b"4b\n", b"4c\n", b"a line longer than a file\n"])
    names = [path, tmp_path / "log.1", tmp_path / "log.2"]
    assert [each.read_text() for each in names] == ["a line longer than a file\n", "4c\n", "4a\n4b\n"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_ends_beyond_the_queue_are_counted_and_not_waited_for(tmp_path: Path) -> None:
    with RotatingFile(tmp_path / "log", 1 << 20, 1) as file:
        log = RequestLog(file, 1000.0, most_queued=2)
        for _ in range(5):
            log.note(ENDED)
        writing = asyncio.create_task(log.run())
        async with asyncio.timeout(10.0):
            await log.close()
            await writing
    assert log.lost == 3
    assert [entry["arrival_s"] for entry in entries(tmp_path / "log")] == [1002.5, 1002.5]


async def test_a_disk_that_fails_loses_lines_but_serving_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with RotatingFile(path, 1, 1) as file:
        log = RequestLog(file, 0.0)
        path.unlink()
        for _ in range(2):
            log.note(ENDED)
        async with asyncio.timeout(10.0):
            await log.close()
            await log.run()
    assert log.lost == 2


async def test_a_path_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router\.request_log: .*No such file"):
        async with request_log(tmp_path / "missing" / "log", 1 << 20, time.monotonic):
            pass
