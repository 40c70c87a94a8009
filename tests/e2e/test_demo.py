"""`tandem demo`: an answer, a stage timeline, and nothing left behind; also on Ctrl-C."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.e2e.live_cluster import shared_memory_segments

pytestmark = pytest.mark.e2e

DEMO = [sys.executable, "-m", "tandem.cli.main", "demo"]


def _left_of(group: int) -> list[psutil.Process]:
    """Processes of our session that carry the demo's marker in their environment."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TANDEM_DEMO_TEST") == str(group):
                left.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return left


def _wait_until_nothing_is_left(marker: int) -> None:
    deadline = time.monotonic() + 10.0
    while _left_of(marker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _left_of(marker)


def test_demo_answers_shows_the_stages_and_leaves_nothing() -> None:
    marker = os.getpid()
    segments = shared_memory_segments()
    environment = {**os.environ, "TANDEM_DEMO_TEST": str(marker)}
    done = subprocess.run(DEMO, capture_output=True, timeout=180, check=False, env=environment)
    output = done.stdout.decode()
    assert done.returncode == 0, output + done.stderr.decode()
    for word in ("queue", "prefill", "hand-off", "decode", "TTFT", "TPOT", "tokens/s"):
        assert word in output
    _wait_until_nothing_is_left(marker)
    assert shared_memory_segments() <= segments


@pytest.mark.parametrize("after_s", [1.0, 6.0])
def test_demo_interrupted_leaves_nothing(after_s: float) -> None:
    marker = os.getpid() * 10 + int(after_s)
    segments = shared_memory_segments()
    environment = {**os.environ, "TANDEM_DEMO_TEST": str(marker)}
    process = subprocess.Popen(DEMO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    assert process.wait(60.0) is not None
    _wait_until_nothing_is_left(marker)
    assert shared_memory_segments() <= segments
