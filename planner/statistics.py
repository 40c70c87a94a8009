"""Pure: percentiles, and how sure one can be of a share."""

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054
"""Standard normal quantile for a two-sided 95 % interval."""


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks; `values` ascending and not empty, share in [0, 1]."""
    position = share * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def wilson_interval(good: int, offered: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a share; (0, 1) when nothing was offered. (Wilson 1927)"""
    if offered == 0:
        return 0.0, 1.0
    share = good / offered
    spread_term = z * math.sqrt(share * (1 - share) / offered + z**2 / (4 * offered**2))
    centre = share + z**2 / (2 * offered)
    scale = 1 + z**2 / offered
    return max(0.0, (centre - spread_term) / scale), min(1.0, (centre + spread_term) / scale)
