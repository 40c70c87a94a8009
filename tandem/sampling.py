"""Pure: how tokens are chosen, with every default filled in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType


class FinishReason(Enum):
    """Why a sample ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; see SamplingParams in protos/tandem/v1/inference.proto for meanings and ranges.

    `seed` is always set inside the cluster: the router derives it from the request id when the client gave
    none, so that a resumed request draws the same random numbers (design, rule 3).
    `logprobs` is None for none, else the number of alternatives to report.
    `max_tokens` is None for "up to the context length".
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    include_stop: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether the choice depends on tokens before it (penalties)."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable a token was, before penalties and temperature (natural logarithm)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Most probable (token id, logprob) at this position, best first."""
