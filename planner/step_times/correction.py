"""Pure: what measured steps teach the roofline: log(measured / roofline), learned for prompts and for
decodes.

Features are (log tokens, log context) of a prompt step and (log batch, log context of a sequence) of a decode
step. Of a ridge regression on quadratic features and gradient boosting the one with the smaller
cross-validated error is kept. Outside the convex hull of its points the correction is that of the nearest
point of its edge, and `caution` says so; a phase without enough points stays a pure roofline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from planner.latency import Caution, LatencyModel, StepShape, total_tokens
from planner.step_times.convex_hull import ConvexHull, Point
from planner.step_times.decode_curve import DecodeCurve, DecodeCurves, Knot
from planner.step_times.profile_file import MeasuredStep

_NAME = "corrected roofline"
_FEWEST_POINTS = 8
_FOLDS = 5
_KNOTS = 17
_BEYOND = 4.0


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a phase was learned: medians of |predicted / measured - 1|, cross-validated."""

    phase: str
    regressor: str
    points: int
    error: float
    roofline_error: float


class Correction:
    """One phase's learned factor, defined everywhere: beyond its hull as at the hull's nearest point."""

    def __init__(self, phase: str, features: Sequence[Point], ratios: Sequence[float], seed: int = 0) -> None:
        """`ratios` are measured / roofline. At least 8 points; fewer give a factor of 1 everywhere."""
        self._hull = ConvexHull(features) if features else None
        self._regressor = None
        if self._hull is None or len(features) < _FEWEST_POINTS:
            self._hull = None
            self.fit = Fit(phase, "none", len(features), 0.0, _error(np.ones(len(ratios)), np.array(ratios)))
            return
        table, target = np.array(features), np.log(np.array(ratios))
        errors: dict[str, float] = {}
        folds = KFold(_FOLDS, shuffle=True, random_state=seed)
        for name, make in _REGRESSORS.items():
            errors[name] = _error(
                np.exp(cross_val_predict(make(seed), table, target, cv=folds)), np.array(ratios)
            )
        best = min(errors, key=lambda name: errors[name])
        self._regressor = _REGRESSORS[best](seed).fit(table, target)
        roofline_error = _error(np.ones(len(ratios)), np.array(ratios))
        self.fit = Fit(phase, best, len(features), errors[best], roofline_error)

    def factors(self, features: Sequence[Point]) -> list[float]:
        """Measured / roofline at each point."""
        if self._regressor is None or self._hull is None:
            return [1.0] * len(features)
        known = np.array([self._hull.nearest(point) for point in features])
        return [exp(value) for value in self._regressor.predict(known)]

    def knows(self, features: Point) -> bool:
        """Whether the point is inside what was measured."""
        return self._hull is not None and self._hull.contains(features)


class CorrectedRoofline:
    """LatencyModel: a roofline times what was learned.

    In a mixed step each phase's factor counts with its share of the roofline's time. Decode times are
    linear between 17 contexts spread geometrically over the measured ones, so that runs have a closed form.
    """

    def __init__(self, base: LatencyModel, points: Sequence[MeasuredStep], seed: int = 0) -> None:
        prompts = [point for point in points if point.prompts and not point.decode_batch]
        decodes = [point for point in points if point.decode_batch and not point.prompts]
        self._base = base
        self._prompt = Correction("prompt", *_learnable(base, prompts, _prompt_features), seed=seed)
        self._decode = Correction("decode", *_learnable(base, decodes, _decode_features), seed=seed)
        contexts = [exp(_decode_features(point.shape)[1]) for point in decodes] or [1.0]
        self._contexts = (min(contexts), max(max(contexts), 2 * min(contexts)))
        self._curves = DecodeCurves(self._curve)
        self._prompt_factors: dict[Point, float] = {}
        self.decode_run_s = self._curves.decode_run_s
        self.decode_steps_within = self._curves.decode_steps_within

    @property
    def fits(self) -> tuple[Fit, Fit]:
        """How well prompts and decodes were learned."""
        return self._prompt.fit, self._decode.fit

    def step_s(self, shape: StepShape) -> float:
        """See LatencyModel."""
        if not shape.prompts:
            return self._curves.step_s(shape)
        prompt_factor = self._prompt_factor(_prompt_features(shape))
        if not shape.decode_batch:
            return prompt_factor * self._base.step_s(shape)
        prompts_s = self._base.step_s(StepShape(shape.prompts))
        decode_s = self._base.step_s(StepShape((), shape.decode_batch, shape.decode_context_tokens))
        decode_factor = self._curves.step_s(shape) / decode_s
        share = prompts_s / (prompts_s + decode_s)
        return self._base.step_s(shape) * (share * prompt_factor + (1 - share) * decode_factor)

    def stage_s(self, shape: StepShape) -> float:
        """See LatencyModel."""
        whole_s = self._base.step_s(shape)
        return self.step_s(shape) * self._base.stage_s(shape) / whole_s if whole_s else 0.0

    def caution(self, shape: StepShape) -> Caution | None:
        """Says when a step lies outside the measured ones, so that it is corrected as at their edge."""
        tokens = total_tokens(shape.prompts)
        if shape.prompts and not self._prompt.knows(_prompt_features(shape)):
            return Caution(_NAME, f"prompt step of {tokens} tokens lies outside the measured points")
        if shape.decode_batch and not self._decode.knows(_decode_features(shape)):
            each = shape.decode_context_tokens // shape.decode_batch
            return Caution(
                _NAME,
                f"decode step of {shape.decode_batch} x {each} tokens lies outside the measured points",
            )
        return None

    def _prompt_factor(self, features: Point) -> float:
        factor = self._prompt_factors.get(features)
        if factor is None:
            factor = self._prompt_factors[features] = self._prompt.factors([features])[0]
        return factor

    def _curve(self, batch: int) -> DecodeCurve:
        low, high = self._contexts
        spread = [low * (high / low) ** (number / (_KNOTS - 1)) for number in range(_KNOTS)]
        contexts = [0.0, *spread, _BEYOND * high]
        factors = self._decode.factors([(log(batch), log(max(1.0, each))) for each in contexts])
        return DecodeCurve(
            [
                Knot(each * batch, factor * self._base.step_s(StepShape((), batch, round(each * batch))))
                for each, factor in zip(contexts, factors, strict=True)
            ]
        )


def _learnable(
    base: LatencyModel, points: Sequence[MeasuredStep], features: Callable[[StepShape], Point]
) -> tuple[list[Point], list[float]]:
    shapes = [point.shape for point in points]
    ratios = [point.seconds / base.step_s(shape) for point, shape in zip(points, shapes, strict=True)]
    return [features(shape) for shape in shapes], ratios


def _prompt_features(shape: StepShape) -> Point:
    """Context is the mean one, weighted by tokens."""
    tokens = total_tokens(shape.prompts)
    context = sum(part.tokens * part.context_tokens for part in shape.prompts) / tokens
    return log(tokens), log(1 + context)


def _decode_features(shape: StepShape) -> Point:
    return log(shape.decode_batch), log(max(1.0, shape.decode_context_tokens / shape.decode_batch))


Floats = npt.NDArray[np.float64]


def _error(predicted: Floats, measured: Floats) -> float:
    return float(np.median(np.abs(predicted / measured - 1))) if len(measured) else 0.0


def _ridge(seed: int) -> Any:
    return make_pipeline(StandardScaler(), PolynomialFeatures(2), Ridge(alpha=1e-3, random_state=seed))


def _boosting(seed: int) -> Any:
    return GradientBoostingRegressor(n_estimators=200, max_depth=3, learning_rate=0.05, random_state=seed)


_REGRESSORS = {"ridge": _ridge, "gradient boosting": _boosting}
