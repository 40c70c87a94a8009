"""Pure: the tokens of a simulated sample: only their number is kept."""

from collections.abc import Sequence
from typing import overload

TOKEN = 0
"""The token that every simulated draw gives; no end token, so that samples end by their lengths."""


class GrownTokens(Sequence[int]):
    """The tokens of a leg, then so many drawn, each of them TOKEN."""

    __slots__ = ("_drawn", "_given")

    def __init__(self, given: Sequence[int], drawn: int) -> None:
        self._given = given
        self._drawn = drawn

    def __len__(self) -> int:
        return len(self._given) + self._drawn

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[int]: ...

    def __getitem__(self, at: int | slice) -> int | Sequence[int]:
        known = len(self._given)
        if isinstance(at, int):
            position = range(len(self))[at]
            return self._given[position] if position < known else TOKEN
        start, stop, _ = at.indices(len(self))
        given = self._given[start : min(stop, known)]
        drawn = stop - max(start, known)
        return (*given, *(TOKEN,) * drawn) if drawn > 0 else given

    def append(self, _token_id: int) -> None:
        """One more was drawn."""
        self._drawn += 1

    def grow(self, count: int) -> None:
        """So many more were drawn."""
        self._drawn += count
