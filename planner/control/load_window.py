"""Pure: what the controller is told: the load of a window, and how many workers play each role."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RolePlacement:
    """How many workers play each role; all are alike."""

    prefill: int
    decode: int

    @property
    def total(self) -> int:
        """Workers of both roles."""
        return self.prefill + self.decode

    @property
    def valid(self) -> bool:
        """Whether every role has a worker."""
        return self.prefill >= 1 and self.decode >= 1

    def __str__(self) -> str:
        return f"{self.prefill} prefill + {self.decode} decode"


def splits(total: int) -> Iterator[RolePlacement]:
    """All valid placements of so many workers."""
    return (RolePlacement(prefill, total - prefill) for prefill in range(1, total))


@dataclass(frozen=True, slots=True)
class LoadWindow:
    """What was measured between `began_s` and `ended_s`, on any clock that all windows share.

    `arrived` counts the requests that came; `lengths` are (prompt, output) tokens of some of them or of
    those that ended, as representative as the source can tell, one mean pair at least unless nothing came.
    `attainment` is the share of requests settled in the window that were good, None when there were none.
    Utilisations are the busy share of the role's workers, 0 to 1, and `placement` is what serves at the
    window's end.
    """

    began_s: float
    ended_s: float
    arrived: int
    lengths: tuple[tuple[int, int], ...]
    attainment: float | None
    prefill_busy: float
    decode_busy: float
    placement: RolePlacement

    @property
    def rate_rps(self) -> float:
        """Requests a second that came; 0 for an empty window."""
        span_s = self.ended_s - self.began_s
        return self.arrived / span_s if span_s > 0 else 0.0
