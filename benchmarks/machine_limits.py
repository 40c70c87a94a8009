"""Edge: how fast this machine reads memory and multiplies matrices, with the threads that torch has now."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.cpu.processor import processor_name

_READ_BYTES = 256 * 1024**2
_GEMM_SIZE = 2048


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """What no engine can beat; rates are decimal units."""

    read_gb_s: float
    """Reading a buffer far larger than the caches, in GB/s."""
    gemm_gflop_s: float
    """Square matrix product in the given type, in GFLOP/s."""

    def best(self, other: "MachineLimits") -> "MachineLimits":
        """The higher of each rate."""
        return MachineLimits(max(self.read_gb_s, other.read_gb_s), max(self.gemm_gflop_s, other.gemm_gflop_s))


def measure_limits(dtype: torch.dtype, runs: int = 5) -> MachineLimits:
    """The best of `runs` runs of the fastest way that torch has to read and to multiply."""
    with torch.inference_mode():
        return MachineLimits(_read_gb_s(runs), _gemm_gflop_s(dtype, runs))


def machine_name() -> str:
    """Processor and number of cores, as in `AMD EPYC, 2 cores`."""
    return f"{processor_name()}, {os.cpu_count()} cores"


def _read_gb_s(runs: int) -> float:
    buffer = torch.ones(_READ_BYTES // 4)
    rows = buffer.view(-1, 4096)
    ways = (lambda: buffer.sum(), lambda: rows.amax(dim=1), lambda: buffer.view(torch.int64).sum())
    return _READ_BYTES / best_s(ways, runs) / 1e9


def _gemm_gflop_s(dtype: torch.dtype, runs: int) -> float:
    left = torch.randn(_GEMM_SIZE, _GEMM_SIZE, dtype=dtype)
    right = torch.randn(_GEMM_SIZE, _GEMM_SIZE, dtype=dtype)
    ways = [lambda: left @ right, lambda: F.linear(left, right)]
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if onednn is not None:
        ways.append(lambda: onednn(left, right, None, "none", [], ""))
    return 2 * _GEMM_SIZE**3 / best_s(ways, runs) / 1e9


def best_s(ways: Sequence[Callable[[], object]], runs: int) -> float:
    """Seconds of the fastest way: each is tried twice, the first time cold, then the best `runs` times."""
    for way in ways:
        way()
    tried_s = [_duration_s(way) for way in ways]
    fastest = ways[tried_s.index(min(tried_s))]
    return min(*tried_s, *(_duration_s(fastest) for _ in range(runs)))


def _duration_s(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
