"""Edge: how long each way to multiply takes on this machine, in bounded time."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from engine.cpu.layouts import BUCKETS, Shape, Times, Way, always
from engine.cpu.linear import Linear, possible_ways

LIMIT_S = 2.5
"""Of all shapes together; what is not measured by then is taken as it usually is best."""

_COLD_BYTES = 24 * 1024**2
"""Of a layout's copies, passed in turn: all layouts' together fit no cache, as in a model's step."""
_MOST_COPIES = 32
_ROUNDS = 5
_BUCKET_S = 0.12
_BEHIND = 2.0
"""A way whose best time is this many times that of the best one is not timed once more."""
_FEW_ROWS = 64
"""With more of them a product is bound by arithmetic, and one copy of the weight shows its time."""
_MOST_FLOP = 4e9
"""Of one product: beyond it the bucket is left to the one before."""


def measure_ways(
    shapes: Iterable[Shape],
    dtype: torch.dtype,
    limit_s: float = LIMIT_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Shape, Times]:
    """Median seconds of a product by shape, rows and way, with the threads that torch has now.

    Shapes that the limit leaves no time for are left out, the last ones first.
    """
    deadline_s = clock() + limit_s
    found: dict[Shape, Times] = {}
    with torch.inference_mode():
        for shape in shapes:
            if clock() < deadline_s and (times := _measure_shape(shape, dtype, deadline_s, clock)):
                found[shape] = times
    return found


def _measure_shape(
    shape: Shape, dtype: torch.dtype, deadline_s: float, clock: Callable[[], float]
) -> dict[int, Mapping[Way, float]]:
    copies = max(1, min(_MOST_COPIES, _COLD_BYTES // (prod(shape) * dtype.itemsize)))
    # One allocation: its pages go back to the system at the end.
    weights = torch.full((copies, *shape), 0.01, dtype=dtype)
    products = {
        way: [Linear(weight, None, always(way)) for weight in weights] for way in possible_ways(weights[0])
    }
    times: dict[int, Mapping[Way, float]] = {}
    for rows in BUCKETS:
        if 2.0 * rows * prod(shape) > _MOST_FLOP:
            break
        if clock() >= deadline_s:
            return {}
        times[rows] = _measure_bucket(products, torch.full((rows, shape[1]), 0.5, dtype=dtype), clock)
    return times


def _measure_bucket(
    products: Mapping[Way, list[Linear]], rows: Tensor, clock: Callable[[], float]
) -> dict[Way, float]:
    """Ways in turn, so that what else the machine does falls on all of them; the first round is not timed."""
    ended_s = clock() + _BUCKET_S
    passed = {way: found[:1] if rows.shape[0] > _FEW_ROWS else found for way, found in products.items()}
    for linears in passed.values():
        linears[0](rows)
    times: dict[Way, list[float]] = {way: [] for way in passed}
    racing = list(passed)
    for _ in range(_ROUNDS):
        for way in racing:
            times[way] += [_duration_s(linear, rows, clock) for linear in passed[way]]
        best_s = min(min(found) for found in times.values())
        racing = [way for way in racing if min(times[way]) < _BEHIND * best_s]
        if clock() > ended_s or len(racing) == 1:
            break
    return {way: statistics.median(found) for way, found in times.items()}


def _duration_s(linear: Linear, rows: Tensor, clock: Callable[[], float]) -> float:
    began_s = clock()
    linear(rows)
    return clock() - began_s
