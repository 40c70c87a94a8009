"""Pure: the convex hull of points in the plane: whether a point is inside, and its nearest one when not.

Says where a learned correction knows data. Andrew's monotone chain.
"""

from collections.abc import Sequence

Point = tuple[float, float]


class ConvexHull:
    """The hull of one point or more; of points on a line it is the stretch between the outermost."""

    __slots__ = ("_corners",)

    def __init__(self, points: Sequence[Point]) -> None:
        ordered = sorted(set(points))
        lower, upper = _half(ordered), _half(ordered[::-1])
        self._corners = lower[:-1] + upper[:-1] if len(ordered) > 1 else ordered

    def contains(self, point: Point) -> bool:
        """Whether the point is inside or, up to rounding, on the edge."""
        nearest = self.nearest(point)
        return _squared(point, nearest) <= 1e-18

    def nearest(self, point: Point) -> Point:
        """The point itself when it is inside, else the nearest one of the edge."""
        corners = self._corners
        edges = list(zip(corners, corners[1:] + corners[:1], strict=True))
        if len(corners) > 2 and all(_turn(start, end, point) >= 0 for start, end in edges):
            return point
        return min((_on_edge(start, end, point) for start, end in edges), key=lambda at: _squared(point, at))


def _half(ordered: Sequence[Point]) -> list[Point]:
    chain: list[Point] = []
    for point in ordered:
        while len(chain) > 1 and _turn(chain[-2], chain[-1], point) <= 0:
            chain.pop()
        chain.append(point)
    return chain


def _turn(start: Point, end: Point, point: Point) -> float:
    """Positive when the point lies left of the way from start to end."""
    return (end[0] - start[0]) * (point[1] - start[1]) - (end[1] - start[1]) * (point[0] - start[0])


def _on_edge(start: Point, end: Point, point: Point) -> Point:
    along = (end[0] - start[0], end[1] - start[1])
    length = along[0] ** 2 + along[1] ** 2
    if length == 0:
        return start
    share = ((point[0] - start[0]) * along[0] + (point[1] - start[1]) * along[1]) / length
    share = min(1.0, max(0.0, share))
    return (start[0] + share * along[0], start[1] + share * along[1])


def _squared(one: Point, other: Point) -> float:
    return (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2
