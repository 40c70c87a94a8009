"""Edge: becomes another program that the kernel kills when our parent dies; standard library only.

Run as a script:

python -I -S exec_guard.py PARENT_PID PROGRAM [ARGUMENT...]
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def guarded(argv: Sequence[str]) -> list[str]:
    """The command that runs a program (its path first) so that it is gone when this process is, however.

    The kernel ties it to the thread that starts it, so that must live as long as the process.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv]


def main() -> None:
    """Ties this process to its parent (Linux only), then becomes the program."""
    parent, argv = int(sys.argv[1]), sys.argv[2:]
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:
            # The parent died before prctl: nobody would ever stop us.
            sys.exit(1)
    os.execv(argv[0], argv)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    main()
