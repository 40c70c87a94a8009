"""Pure: over which transport a sink pulls from a source: the best one that has not failed lately.

A transport that failed is left aside for a while, twice as long after every failure in a row. Then one pull
tries it while the others stay where they are; when that works, it is back in its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvtransfer.contract import PeerId


@dataclass(slots=True)
class _Outage:
    """A transport that failed; `trial` while one pull tries it again."""

    failures: int
    until_s: float
    trial: bool = False


class RoadChoice:
    """The outages of every pair. Every `now_s` is one monotonic clock's; seconds."""

    def __init__(self, backoff_s: float, cap_s: float) -> None:
        self._backoff_s = backoff_s
        self._cap_s = cap_s
        self._outages: dict[tuple[PeerId, str], _Outage] = {}

    def order(self, peer: PeerId, names: Sequence[str], now_s: float) -> tuple[str, ...]:
        """The names to try, best first; those left aside come last, the one due first before the others.

        A name whose time has come is in its place again for this caller alone, until its attempt failed or
        worked, or as long again has passed without news.
        """
        return tuple(sorted(names, key=lambda name: self._rank(peer, name, now_s)))

    def failed(self, peer: PeerId, name: str, now_s: float) -> None:
        """An attempt failed. Others that fail while it is left aside belong to the same outage."""
        outage = self._outages.setdefault((peer, name), _Outage(0, now_s))
        if now_s < outage.until_s and not outage.trial:
            return
        outage.failures += 1
        outage.trial = False
        outage.until_s = now_s + self._pause_s(outage)

    def worked(self, peer: PeerId, name: str) -> None:
        """A transfer landed: whatever was, is over."""
        self._outages.pop((peer, name), None)

    def forget(self, peer: PeerId) -> None:
        """The source is gone; its next life starts clean."""
        for place in [place for place in self._outages if place[0] == peer]:
            del self._outages[place]

    def _rank(self, peer: PeerId, name: str, now_s: float) -> float:
        outage = self._outages.get((peer, name))
        if outage is None:
            return 0.0
        if now_s < outage.until_s:
            return outage.until_s - now_s
        outage.trial = True
        outage.until_s = now_s + self._pause_s(outage)
        return 0.0

    def _pause_s(self, outage: _Outage) -> float:
        return min(self._cap_s, self._backoff_s * 2.0 ** min(outage.failures - 1, 30))
