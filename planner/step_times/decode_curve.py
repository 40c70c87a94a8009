"""Pure: the time of many decode steps of an unchanging batch, without walking through the steps.

Every latency model here has decode times that are piecewise linear in the tokens read, so that a run of
steps is a sum of arithmetic series, one for each piece that the run crosses.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil, isfinite, sqrt
from typing import NamedTuple

from planner.latency import StepShape
from tandem.errors import ConfigError

_FAR_TOKENS = 1e6


class Knot(NamedTuple):
    """A point of a curve: a step that reads `context_tokens` takes `seconds`."""

    context_tokens: float
    seconds: float


class DecodeCurve:
    """Step time of one batch size by the tokens read: linear between knots, and beyond the last as before
    it."""

    __slots__ = ("_base", "_from", "_slope")

    def __init__(self, knots: Sequence[Knot]) -> None:
        """`knots` by ascending context; below the first the first piece goes on, beyond the last never falls.

        Raises ConfigError when there is none, when they do not ascend, or when a time is not positive.
        """
        _check(knots)
        pieces = [_line(*pair) for pair in pairwise(knots)] or [(knots[0].seconds, 0.0)]
        last_slope = pieces[-1][1]
        if last_slope < 0:
            pieces.append((knots[-1].seconds, 0.0))
            starts = [0.0, *(knot.context_tokens for knot in knots[1:])]
        else:
            starts = [0.0, *(knot.context_tokens for knot in knots[1:-1])]
        self._from = tuple(starts)
        self._base = tuple(base for base, _ in pieces)
        self._slope = tuple(slope for _, slope in pieces)

    def step_s(self, context_tokens: float) -> float:
        """Time of the step that reads `context_tokens`."""
        piece = bisect_right(self._from, context_tokens) - 1
        return self._base[piece] + self._slope[piece] * context_tokens

    def run_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """Time of `steps` steps, each of which reads `batch` tokens more than the one before."""
        piece = bisect_right(self._from, context_tokens) - 1
        if piece + 1 == len(self._from):
            return self._sum_s(piece, batch, context_tokens, steps)
        total_s = 0.0
        while steps > 0:
            count = min(steps, self._steps_in(piece, batch, context_tokens))
            total_s += self._sum_s(piece, batch, context_tokens, count)
            steps -= count
            context_tokens += count * batch
            piece += 1
        return total_s

    def steps_within(self, batch: int, context_tokens: int, within_s: float) -> int:
        """How many such steps end within `within_s`."""
        done = 0
        piece = bisect_right(self._from, context_tokens) - 1
        while True:
            here = self._steps_in(piece, batch, context_tokens)
            if piece + 1 < len(self._from):
                whole_s = self._sum_s(piece, batch, context_tokens, here)
                if whole_s <= within_s:
                    done, context_tokens, within_s = (
                        done + here,
                        context_tokens + here * batch,
                        within_s - whole_s,
                    )
                    piece += 1
                    continue
            return done + self._count_within(piece, batch, context_tokens, within_s, here)

    def _steps_in(self, piece: int, batch: int, context_tokens: int) -> int:
        """How many steps from `context_tokens` on begin inside the piece."""
        if piece + 1 >= len(self._from):
            return 1 << 62
        return max(0, ceil((self._from[piece + 1] - context_tokens) / batch))

    def _sum_s(self, piece: int, batch: int, context_tokens: int, count: int) -> float:
        first_s = self._base[piece] + self._slope[piece] * context_tokens
        return count * first_s + self._slope[piece] * batch * (count * (count - 1) / 2)

    def _count_within(self, piece: int, batch: int, context_tokens: int, within_s: float, most: int) -> int:
        """Largest count whose sum fits: the root of the quadratic, corrected for rounding."""
        first_s = self._base[piece] + self._slope[piece] * context_tokens
        half_growth_s = self._slope[piece] * batch / 2
        linear_s = first_s - half_growth_s
        root = sqrt(max(0.0, linear_s * linear_s + 4 * half_growth_s * within_s))
        count = max(0, min(most, int(2 * within_s / (linear_s + root))))
        while count < most and self._sum_s(piece, batch, context_tokens, count + 1) <= within_s:
            count += 1
        while count > 0 and self._sum_s(piece, batch, context_tokens, count) > within_s:
            count -= 1
        return count


def straight(base_s: float, by_token_s: float) -> DecodeCurve:
    """The curve of a model whose steps take `base_s`, and `by_token_s` for each token read."""
    return DecodeCurve([Knot(0.0, base_s), Knot(_FAR_TOKENS, base_s + by_token_s * _FAR_TOKENS)])


class DecodeCurves:
    """One curve for each batch size, made when first asked for; gives a model its two decode answers."""

    __slots__ = ("_curves", "_make")

    def __init__(self, make: Callable[[int], DecodeCurve]) -> None:
        self._make = make
        self._curves: dict[int, DecodeCurve] = {}

    def of(self, batch: int) -> DecodeCurve:
        """The curve of a batch size of 1 or more."""
        curve = self._curves.get(batch)
        if curve is None:
            curve = self._curves[batch] = self._make(batch)
        return curve

    def step_s(self, shape: StepShape) -> float:
        """Time of the decode part of a step; 0 without one."""
        if shape.decode_batch == 0:
            return 0.0
        return self.of(shape.decode_batch).step_s(shape.decode_context_tokens)

    def decode_run_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """See LatencyModel."""
        return self.of(batch).run_s(batch, context_tokens, steps) if batch else 0.0

    def decode_steps_within(self, batch: int, context_tokens: int, within_s: float) -> int:
        """See LatencyModel; 0 for an empty batch or no time."""
        return self.of(batch).steps_within(batch, context_tokens, within_s) if batch and within_s > 0 else 0


def _line(left: Knot, right: Knot) -> tuple[float, float]:
    slope = (right.seconds - left.seconds) / (right.context_tokens - left.context_tokens)
    return left.seconds - slope * left.context_tokens, slope


def _check(knots: Sequence[Knot]) -> None:
    if not knots:
        raise ConfigError("a decode curve needs a measured point at least; it has none")
    for left, right in pairwise(knots):
        if right.context_tokens <= left.context_tokens:
            raise ConfigError(f"decode points must have ascending contexts, not {left} before {right}")
    for knot in knots:
        if not (isfinite(knot.seconds) and knot.seconds > 0):
            raise ConfigError(f"a decode step must take a positive time, not {knot.seconds} s")
    if len(knots) > 1 and _line(knots[0], knots[1])[0] <= 0:
        raise ConfigError(f"decode times fall to 0 below {knots[0].context_tokens:g} tokens of context")
