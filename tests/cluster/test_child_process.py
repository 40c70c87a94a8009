"""Edge: owned processes end in order, and do not outlive a parent that was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cluster.child_process import ChildProcess, tail

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('on', flush=True)\n"
    "time.sleep(60)",
]
PARENT = """
import asyncio, os, signal, sys
from pathlib import Path
from cluster.child_process import ChildProcess

async def main():
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = await ChildProcess.start("sleeper", sleeper, Path(sys.argv[1]))
    print(child.pid, flush=True)
    await child.wait()

asyncio.run(main())
"""


async def test_output_goes_to_the_log_and_the_exit_code_comes_back(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import sys; sys.stderr.write('last words'); sys.exit(3)"]
    child = await ChildProcess.start("short", argv, tmp_path / "log")
    assert await child.wait() == 3
    assert child.log_tail() == "last words"


async def test_stop_is_gentle_first(tmp_path: Path) -> None:
    child = await ChildProcess.start("sleeper", SLEEPER, tmp_path / "log")
    assert await child.stop(5.0) == -signal.SIGTERM
    assert await child.stop(5.0) == -signal.SIGTERM


async def test_stop_kills_a_process_that_will_not_end(tmp_path: Path) -> None:
    child = await ChildProcess.start("stubborn", STUBBORN, tmp_path / "log")
    assert await child.read_line() == b"on\n"
    started_s = time.monotonic()
    assert await child.stop(0.2) == -signal.SIGKILL
    assert time.monotonic() - started_s < 3.0


async def test_ctrl_c_in_the_terminal_does_not_reach_it(tmp_path: Path) -> None:
    child = await ChildProcess.start("sleeper", SLEEPER, tmp_path / "log")
    assert os.getsid(child.pid) != os.getsid(0)
    await child.stop(5.0)


def test_child_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait(5.0)
        _, alive = psutil.wait_procs([child], timeout=5.0)
    assert not alive


def test_tail_of_a_long_log_is_its_end(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x" * 10_000 + "\nthe end\n")
    assert tail(tmp_path / "log").endswith("\nthe end")
    assert len(tail(tmp_path / "log")) < 5_000
    assert tail(tmp_path / "none") == ""
