"""Pure: which of the ways to multiply by a weight is taken for how many rows, from measured times."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import isqrt, prod

BUCKETS = (1, 8, 32, 512)
"""Numbers of rows that are measured: decode batches and a prefill step."""

EXTRA_SHARE = 0.1
"""Of all weights' bytes: what second layouts may take, well within the 15 % that a worker may waste."""

_WORTH_IT = 0.8
"""A second layout must need at most this share of the first one's time."""
_MARGIN = 0.95
"""A layout later in Layout's order must need at most this share of an earlier one's time."""

Shape = tuple[int, int]
"""Of a weight: (out, in)."""


class Layout(Enum):
    """How a weight lies in memory; which one is taken when times are equal is their order."""

    PACKED = "packed"
    STORED = "stored"
    TRANSPOSED = "transposed"


class Way(Enum):
    """One way to multiply rows by a weight; the value is its name in logs and cache files."""

    PACKED = "packed"
    """oneDNN's product on a copy that oneDNN reordered."""
    ONEDNN = "onednn"
    """oneDNN's product on the weight as it is stored."""
    BLAS = "blas"
    """F.linear on the weight as it is stored."""
    TRANSPOSED = "transposed"
    """torch's product with a copy [in, out]."""

    @property
    def layout(self) -> Layout:
        """What it needs in memory."""
        return _LAYOUT_OF[self]


_LAYOUT_OF = {
    Way.PACKED: Layout.PACKED,
    Way.ONEDNN: Layout.STORED,
    Way.BLAS: Layout.STORED,
    Way.TRANSPOSED: Layout.TRANSPOSED,
}


@dataclass(frozen=True, slots=True)
class Band:
    """From the rows of the band before up to `most_rows` (None: any number) this way is taken."""

    most_rows: int | None
    way: Way


Bands = tuple[Band, ...]
"""Ascending; only the last one has no `most_rows`."""

Times = Mapping[int, Mapping[Way, float]]
"""Seconds of a product by rows and way; what was too slow to be worth measuring is left out."""


def always(way: Way) -> Bands:
    """One way for any number of rows."""
    return (Band(None, way),)


def packed_up_to(times: Times, most_rows: int) -> Times:
    """The times that count where up to `most_rows` rows are multiplied natively over the packed layout.

    The native product was not timed; it is no slower than oneDNN's over the same layout (decision 008).
    """
    return {
        rows: {Way.PACKED: found[Way.PACKED]} if rows <= most_rows and Way.PACKED in found else found
        for rows, found in times.items()
    }


def choose(times: Mapping[Shape, Times], counts: Mapping[Shape, int]) -> dict[Shape, Bands]:
    """The bands of every shape that has times; `counts` is how many weights have it.

    A weight is kept in one layout, the one that loses least against the best of each bucket; in a second one
    as well where that is worth it and fits EXTRA_SHARE, the greatest saving for its bytes first.
    """
    firsts = {shape: _best_layout(found) for shape, found in times.items() if found}
    seconds = {shape: _second_layout(times[shape], first) for shape, first in firsts.items()}
    left = EXTRA_SHARE * sum(prod(shape) * count for shape, count in counts.items())
    chosen: dict[Shape, Bands] = {}
    for shape in sorted(firsts, key=lambda one: seconds[one][1] / prod(one), reverse=True):
        layouts = {firsts[shape]}
        second, _ = seconds[shape]
        size = prod(shape) * counts.get(shape, 0)
        if second is not None and size <= left:
            left -= size
            layouts.add(second)
        chosen[shape] = _bands(times[shape], layouts)
    return chosen


def _best_layout(times: Times) -> Layout:
    """A layout without a time in some bucket was far behind there."""
    best = None
    least = float("inf")
    for layout in Layout:
        losses = [_layout_s(found, layout) / min(found.values()) for found in times.values()]
        if sum(losses) < least * (_MARGIN if best is not None else 1.0):
            best, least = layout, sum(losses)
    return best or Layout.STORED


def _second_layout(times: Times, first: Layout) -> tuple[Layout | None, float]:
    """The one that saves most seconds over the buckets where it is worth it, and these seconds."""
    best: tuple[Layout | None, float] = (None, 0.0)
    for layout in Layout:
        saved_s = 0.0
        for found in times.values():
            mine_s, first_s = _layout_s(found, layout), _layout_s(found, first)
            if mine_s <= _WORTH_IT * first_s:
                saved_s += first_s - mine_s if first_s != float("inf") else mine_s
        if saved_s > best[1]:
            best = (layout, saved_s)
    return best


def _layout_s(found: Mapping[Way, float], layout: Layout) -> float:
    return min((seconds for way, seconds in found.items() if way.layout is layout), default=float("inf"))


def _bands(times: Times, layouts: set[Layout]) -> Bands:
    """The fastest way of each bucket among the layouts that are kept; a bucket reaches half-way to the next.

    A bucket in which no such way was measured goes with the one before it.
    """
    rows = sorted(times)
    ways: list[Way] = []
    for bucket in rows:
        kept = {way: seconds for way, seconds in times[bucket].items() if way.layout in layouts}
        ways.append(min(kept, key=kept.__getitem__) if kept else ways[-1] if ways else _any_way(layouts))
    bands: list[Band] = []
    for index, way in enumerate(ways):
        last = index == len(ways) - 1
        if last or ways[index + 1] is not way:
            bands.append(Band(None if last else isqrt(rows[index] * rows[index + 1]), way))
    return tuple(bands)


def _any_way(layouts: set[Layout]) -> Way:
    return next(way for way in Way if way.layout in layouts)
