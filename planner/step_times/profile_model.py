"""Pure: step times interpolated between the points of a measured profile.

Decode: linear in the tokens read at each measured batch, and linear between batches at equal context.
Prompts: what a prompt takes beside attention is linear between measured lengths and beyond them; attention is
priced by the time of a (token, earlier token) pair, which the points with context or with several prompts
show by least squares. Mixed steps: the decoding tokens pass the linear
layers with the prompt.
"""

from bisect import bisect_left
from collections.abc import Sequence
from statistics import median

from planner.latency import Caution, StepShape, total_tokens
from planner.step_times.decode_curve import DecodeCurve, DecodeCurves, Knot
from planner.step_times.profile_file import MeasuredStep, Profile
from tandem.errors import ConfigError

_NAME = "measured profile"


class ProfileModel:
    """LatencyModel of the very machine that was measured (tp and pp as measured: one pipeline stage)."""

    def __init__(self, profile: Profile) -> None:
        """Raises ConfigError when the profile has no prompt or no decode points."""
        self._overhead_s = profile.step_overhead_s
        self._prompt_times = _mean_by(_prompt_points(profile.points))
        self._own_pairs = {tokens: tokens * tokens / 2 for tokens in self._prompt_times}
        self._batches = _decode_points(profile.points)
        if not self._prompt_times or not self._batches:
            raise ConfigError(
                "a profile needs points with one prompt and no context, and points that only decode"
            )
        self._sizes = sorted(self._batches)
        self._pair_s = 0.0
        self._pair_s = self._fitted_pair_s(profile.points)
        self._curves = DecodeCurves(self._curve)
        self._mixed = 1.0
        self._mixed = self._fitted_mixed(profile.points)
        self.decode_run_s = self._curves.decode_run_s
        self.decode_steps_within = self._curves.decode_steps_within

    def step_s(self, shape: StepShape) -> float:
        """See LatencyModel."""
        if not shape.prompts:
            return self._curves.step_s(shape)
        if not shape.decode_batch:
            return self._overhead_s + self._prompts_s(shape, total_tokens(shape.prompts))
        together_s = self._prompts_s(shape, total_tokens(shape.prompts) + shape.decode_batch)
        curve = self._curves.of(shape.decode_batch)
        reading_s = max(0.0, curve.step_s(shape.decode_context_tokens) - curve.step_s(0))
        floor_s = self._curves.step_s(shape)
        return max(floor_s, self._overhead_s + self._mixed * (together_s + reading_s))

    def stage_s(self, shape: StepShape) -> float:
        """See LatencyModel; a profile is of one stage."""
        return self.step_s(shape)

    def caution(self, shape: StepShape) -> Caution | None:
        """Says when a step lies beyond what was measured, so that its time is extrapolated."""
        longest = max(self._prompt_times)
        tokens = total_tokens(shape.prompts) + (shape.decode_batch if shape.prompts else 0)
        if tokens > longest:
            return Caution(_NAME, f"a step of {tokens} prompt tokens; at most {longest} were measured")
        if shape.decode_batch > self._sizes[-1]:
            return Caution(_NAME, f"a batch of {shape.decode_batch}; at most {self._sizes[-1]} were measured")
        return None

    def _prompts_s(self, shape: StepShape, tokens: int) -> float:
        pairs = sum(part.tokens * (part.context_tokens + part.tokens / 2) for part in shape.prompts)
        whole_s = _interpolated(self._prompt_times, tokens)
        return max(whole_s + self._pair_s * self._other_pairs(pairs, tokens), whole_s * 0.1)

    def _other_pairs(self, pairs: float, tokens: float) -> float:
        """What the pairs of a step are more than those within the interpolated time of one prompt as long."""
        return pairs - _interpolated(self._own_pairs, tokens)

    def _fitted_pair_s(self, points: Sequence[MeasuredStep]) -> float:
        """Least squares over prompt points with context or with several prompts; never negative."""
        products = squares = 0.0
        for point in points:
            if (
                point.decode_batch
                or not point.prompts
                or (len(point.prompts) == 1 and not point.prompts[0][1])
            ):
                continue
            tokens = sum(length for length, _ in point.prompts)
            pairs = sum(n * (context + n / 2) for n, context in point.prompts)
            extra_pairs = self._other_pairs(pairs, tokens)
            extra_s = point.seconds - _interpolated(self._prompt_times, tokens)
            products += extra_pairs * extra_s
            squares += extra_pairs * extra_pairs
        return max(0.0, products / squares) if squares else 0.0

    def _fitted_mixed(self, points: Sequence[MeasuredStep]) -> float:
        """How much longer mixed steps took than their parts suggest, at the median."""
        ratios = [
            point.seconds / (self.step_s(point.shape) - self._overhead_s)
            for point in points
            if point.prompts and point.decode_batch
        ]
        return median(ratios) if ratios else 1.0

    def _curve(self, batch: int) -> DecodeCurve:
        right = min(bisect_left(self._sizes, batch), len(self._sizes) - 1)
        high = self._sizes[right]
        low = self._sizes[max(0, right - 1)] if batch != high else high
        share = (batch - low) / (high - low) if high != low else 0.0
        contexts = sorted({context for size in (low, high) for context, _ in self._batches[size]})
        knots = []
        for context in contexts:
            low_s = _interpolated(dict(self._batches[low]), context)
            high_s = _interpolated(dict(self._batches[high]), context)
            seconds = low_s + share * (high_s - low_s)
            knots.append(Knot(context * batch, self._overhead_s + max(seconds, 0.1 * min(low_s, high_s))))
        return DecodeCurve(_rising(knots))


def _prompt_points(points: Sequence[MeasuredStep]) -> list[tuple[float, float]]:
    return [
        (point.prompts[0][0], point.seconds)
        for point in points
        if len(point.prompts) == 1 and not point.decode_batch and not point.prompts[0][1]
    ]


def _decode_points(points: Sequence[MeasuredStep]) -> dict[int, list[tuple[float, float]]]:
    """(context of a sequence, seconds) by batch, contexts ascending."""
    batches: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        if point.decode_batch and not point.prompts:
            context = point.decode_context_tokens / point.decode_batch
            batches.setdefault(point.decode_batch, []).append((context, point.seconds))
    return {batch: sorted(_mean_by(found).items()) for batch, found in batches.items()}


def _mean_by(points: Sequence[tuple[float, float]]) -> dict[float, float]:
    grouped: dict[float, list[float]] = {}
    for where, seconds in points:
        grouped.setdefault(where, []).append(seconds)
    return {where: sum(found) / len(found) for where, found in sorted(grouped.items())}


def _interpolated(times: dict[float, float], where: float) -> float:
    """Linear between points; below the first as the first, beyond the last as the last piece rises."""
    known = list(times)
    right = bisect_left(known, where)
    if right == 0 or len(known) == 1:
        return times[known[0]]
    right = min(right, len(known) - 1)
    left, high = known[right - 1], known[right]
    slope = (times[high] - times[left]) / (high - left)
    if where > high:
        return times[high] + max(0.0, slope) * (where - high)
    return times[left] + slope * (where - left)


def _rising(knots: list[Knot]) -> list[Knot]:
    """Noise may make the first piece cross 0 at no context: it then starts flat."""
    if len(knots) > 1 and knots[0].context_tokens > 0:
        slope = (knots[1].seconds - knots[0].seconds) / (knots[1].context_tokens - knots[0].context_tokens)
        if knots[0].seconds - slope * knots[0].context_tokens <= 0:
            return [Knot(0.0, knots[0].seconds), *knots]
    return knots
