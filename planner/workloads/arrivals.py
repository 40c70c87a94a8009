"""Pure: when requests come: Poisson, Gamma (bursty or regular), or at a fixed rate."""

import math
from collections.abc import Iterator
from enum import Enum
from itertools import count
from typing import Protocol

from tandem.errors import InvalidRequest


class Draws(Protocol):
    """The part of random.Random that is used; the caller seeds it."""

    def expovariate(self, lambd: float) -> float:
        """Exponential, mean 1/lambd."""
        ...

    def gammavariate(self, alpha: float, beta: float) -> float:
        """Gamma, mean alpha * beta."""
        ...


class ArrivalProcess(Enum):
    """How the gaps between requests are drawn."""

    POISSON = "poisson"
    GAMMA = "gamma"
    FIXED = "fixed"


def arrival_times_s(
    process: ArrivalProcess, rate_rps: float, draws: Draws, variation: float = 1.0
) -> Iterator[float]:
    """Endless times in seconds, ascending, the first one gap after 0, with `rate_rps` requests a second.

    `variation` is the Gamma gaps' coefficient of variation: 1 is Poisson, above 1 comes in bursts.
    Raises InvalidRequest unless rate and variation are positive and finite.
    """
    for name, value in (("rate", rate_rps), ("variation", variation)):
        if not (value > 0 and math.isfinite(value)):
            raise InvalidRequest(f"{name} must be positive and finite, not {value}.", name)
    if process is ArrivalProcess.FIXED:
        return (number / rate_rps for number in count(1))
    return _summed(process, rate_rps, draws, variation)


def _summed(process: ArrivalProcess, rate_rps: float, draws: Draws, variation: float) -> Iterator[float]:
    shape = 1.0 / variation**2
    now_s = 0.0
    while True:
        if process is ArrivalProcess.POISSON:
            now_s += draws.expovariate(rate_rps)
        else:
            now_s += draws.gammavariate(shape, 1.0 / (rate_rps * shape))
        yield now_s
