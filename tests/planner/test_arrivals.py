"""Edge: arrival processes have the rate and the burstiness that was asked for (seeded draws)."""

import math
import random
import statistics
from itertools import islice, pairwise

import pytest

from planner.workloads.arrivals import ArrivalProcess, arrival_times_s
from tandem.errors import InvalidRequest

COUNT = 20_000
RATE = 4.0


def gaps(process: ArrivalProcess, variation: float = 1.0) -> list[float]:
    times = list(islice(arrival_times_s(process, RATE, random.Random(1), variation), COUNT))
    return [b - a for a, b in pairwise([0.0, *times])]


@pytest.mark.parametrize(
    ("process", "variation", "expected"),
    [
        (ArrivalProcess.POISSON, 1.0, 1.0),
        (ArrivalProcess.GAMMA, 1.0, 1.0),
        (ArrivalProcess.GAMMA, 3.0, 3.0),
        (ArrivalProcess.GAMMA, 0.25, 0.25),
        (ArrivalProcess.FIXED, 1.0, 0.0),
    ],
)
def test_gaps_have_the_rate_and_variation_asked_for(
    process: ArrivalProcess, variation: float, expected: float
) -> None:
    drawn = gaps(process, variation)
    mean = statistics.fmean(drawn)
    assert min(drawn) >= 0
    # Six standard errors of a mean of COUNT gaps.
    assert abs(mean - 1 / RATE) <= 6 * max(expected, 1e-9) / RATE / math.sqrt(COUNT) + 1e-9
    assert statistics.pstdev(drawn) / mean == pytest.approx(expected, rel=0.1, abs=1e-6)


def test_same_seed_same_times() -> None:
    assert gaps(ArrivalProcess.GAMMA, 2.0) == gaps(ArrivalProcess.GAMMA, 2.0)


@pytest.mark.parametrize(
    ("rate", "variation"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0), (math.inf, 1)]
)
def test_impossible_numbers_are_refused(rate: float, variation: float) -> None:
    with pytest.raises(InvalidRequest, match="must be positive and finite"):
        arrival_times_s(ArrivalProcess.POISSON, rate, random.Random(0), variation)
