"""Pure: latency objectives, and whether a request met them."""

from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """A stage of a request's way; an SLO miss names the one that caused it."""

    # Enum's own hash is Python code, and durations are kept by stage.
    __hash__ = object.__hash__

    QUEUE = "queue"
    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class SloClass:
    """Objectives of one class: a request is good iff it meets all three (seconds)."""

    name: str
    ttft_s: float
    tpot_s: float
    longest_gap_s: float
