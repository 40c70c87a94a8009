"""Edge: compiled loops on the threads that torch computes with.

Two pools of threads that both spin on the same cores take turns in stealing them. So a kernel runs as a
parallel region of the very OpenMP runtime that torch has loaded (its GOMP entry points): between two of
torch's operators no thread changes hands.
"""

import ctypes
import hashlib
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final

import llvmlite.binding
import numba
import structlog
import torch
from numba import types

from engine.cache_folder import cache_folder
from engine.native.kernels import arithmetic

_SYMBOLS: Final = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
_KERNELS: Final = Path(arithmetic.__file__).parent

_log = structlog.get_logger("tandem.engine")


Launch = Callable[[int, int, int, int], None]
"""GOMP_parallel: runs the code at an address, given that of its arguments, on so many threads; flags 0."""


@dataclass(slots=True)
class LaunchTimes:
    """What kernels took of the calling thread's time, hand-over to the other threads included."""

    calls: int = 0
    seconds: float = 0.0


class Team:
    """`threads` of torch's threads, for kernels between its operators; for one thread that calls."""

    def __init__(self, threads: int, launch: Launch) -> None:
        self.threads = threads
        self.launch = launch

    def kernel(self, function: Callable[[Any], None], arguments: int) -> "Kernel":
        """Compiles a function of engine.native.kernels that takes so many arguments, or loads it."""
        return Kernel(self, compiled(function), arguments)

    @contextmanager
    def timed(self) -> Iterator[LaunchTimes]:
        """Adds up the times of this team's kernels, each of which gets slower by two looks at the clock."""
        times, plain = LaunchTimes(), self.launch

        def launch(address: int, arguments: int, threads: int, flags: int) -> None:
            began_s = time.perf_counter()
            plain(address, arguments, threads, flags)
            times.seconds += time.perf_counter() - began_s
            times.calls += 1

        self.launch = launch
        try:
            yield times
        finally:
            self.launch = plain


class Kernel:
    """One compiled loop with room for its arguments."""

    def __init__(self, team: Team, address: int, arguments: int) -> None:
        self._team = team
        self._pack = struct.Struct(f"{arguments}q").pack_into
        self._buffer = ctypes.create_string_buffer(8 * arguments)
        self._address = address
        self._arguments = ctypes.addressof(self._buffer)

    def __call__(self, *arguments: int) -> None:
        """Runs it on all threads of the team and waits."""
        self._pack(self._buffer, 0, *arguments)
        self._team.launch(self._address, self._arguments, self._team.threads, 0)

    def alone(self, *arguments: int) -> None:
        """Runs it on the calling thread: for less work than a hand-over takes."""
        self._pack(self._buffer, 0, *arguments)
        self._team.launch(self._address, self._arguments, 1, 0)


def team_of_torch(threads: int) -> Team | None:
    """None where torch's threads are not those of an OpenMP runtime with GOMP's entry points."""
    runtime = ctypes.CDLL(torch._C.__file__)
    if not all(hasattr(runtime, name) for name in (*_SYMBOLS, "GOMP_parallel")):
        return None
    for name in _SYMBOLS:
        address = ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value
        llvmlite.binding.add_symbol(name, address)
    fork = runtime.GOMP_parallel
    fork.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    fork.restype = None
    return Team(threads, fork)


@cache
def compiled(function: Callable[[Any], None]) -> int:
    """Address of the machine code; it is kept on disk for the next process, where that can be written."""
    folder = _code_folder()
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = folder or ""
    try:
        code = numba.cfunc(types.void(types.int64), cache=bool(folder))(function)
    finally:
        numba.config.CACHE_DIR = before
    _CODE.append(code)
    address: int = code.address
    return address


_CODE: Final[list[Any]] = []
"""What was compiled in this process: it must live as long as its addresses are in use."""


@cache
def _code_folder() -> str | None:
    """A folder for each version of the kernels: numba looks at one file's age, not at its imports'."""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(_KERNELS.glob("*.py")):
        digest.update(path.read_bytes())
    folder = cache_folder() / "native" / digest.hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _log.warning("native code is not kept", folder=str(folder), reason=error.strerror)
        return None
    return str(folder)
