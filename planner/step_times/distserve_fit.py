"""Pure: DistServe's fitted step times (OSDI'24; LLMServe/DistServe, simdistserve, Apache-2.0).

Milliseconds in the file: prefill a + b * sum(tokens) + c * sum(tokens^2); decode a + b * sum(context) + c
* batch, one fit below and one from a threshold of the batch on. A pipeline's stage takes that over pp.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.latency import PromptPart, StepShape
from planner.step_times.decode_curve import DecodeCurve, DecodeCurves, straight
from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class FitCoefficients:
    """One tensor-parallel degree's coefficients, in seconds: constant, by token (or context), by square
    (or batch)."""

    prefill: tuple[float, float, float]
    decode_small: tuple[float, float, float]
    decode_large: tuple[float, float, float]
    large_from_batch: int


class DistServeFit:
    """LatencyModel with DistServe's coefficients.

    DistServe never mixes prompts and decodes in a step. Where a scheduler does, the decoding tokens pass the
    linear layers beside the prompt (the prefill's time by token) and read their context (the decode's time by
    context); such a step is never faster than its prompts or its decodes alone.
    """

    def __init__(self, coefficients: FitCoefficients, pp: int = 1) -> None:
        """Raises ConfigError unless pp is 1 or more."""
        if pp < 1:
            raise ConfigError(f"pp must be 1 or more, not {pp}")
        self._fit = coefficients
        self._pp = pp
        self._curves = DecodeCurves(self._curve)
        self.decode_run_s = self._curves.decode_run_s
        self.decode_steps_within = self._curves.decode_steps_within

    def step_s(self, shape: StepShape) -> float:
        """See LatencyModel."""
        if not shape.prompts:
            return self._curves.step_s(shape)
        alone_s = self._prefill_s(shape.prompts)
        if not shape.decode_batch:
            return alone_s
        beside_s = self._fit.prefill[1] * shape.decode_batch
        beside_s += self._decode_fit(shape.decode_batch)[1] * shape.decode_context_tokens
        return max(alone_s + beside_s, self._curves.step_s(shape))

    def stage_s(self, shape: StepShape) -> float:
        """See LatencyModel."""
        return self.step_s(shape) / self._pp

    def _prefill_s(self, prompts: Sequence[PromptPart]) -> float:
        """A chunk's share of the square is what it adds: (context + tokens)^2 - context^2."""
        constant_s, by_token_s, by_square_s = self._fit.prefill
        tokens = sum(part.tokens for part in prompts)
        squares = sum(part.tokens * (part.tokens + 2 * part.context_tokens) for part in prompts)
        return constant_s + by_token_s * tokens + by_square_s * squares

    def _decode_fit(self, batch: int) -> tuple[float, float, float]:
        return self._fit.decode_small if batch < self._fit.large_from_batch else self._fit.decode_large

    def _curve(self, batch: int) -> DecodeCurve:
        constant_s, by_context_s, by_sequence_s = self._decode_fit(batch)
        return straight(constant_s + by_sequence_s * batch, by_context_s)


def read_fits(document: Mapping[str, Any]) -> dict[str, dict[int, FitCoefficients]]:
    """DistServe's JSON: coefficients by model and tensor-parallel degree. Raises ConfigError on another
    shape."""
    try:
        return {
            model: {int(tp): _coefficients(entry) for tp, entry in by_tp.items()}
            for model, by_tp in document.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"not a profile in DistServe's form: {error!r}") from error


def _coefficients(entry: Mapping[str, Any]) -> FitCoefficients:
    def three(name: str) -> tuple[float, float, float]:
        first, second, third = (float(value) / 1e3 for value in entry[name])
        return first, second, third

    return FitCoefficients(
        three("prefill"),
        three("decoding_smallbs"),
        three("decoding_largebs"),
        int(entry["decoding_large_small_bs_threshold"]),
    )
