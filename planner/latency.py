"""Pure: what a latency model answers: how long a step takes, and how long KV takes to move.

One interface for DistServe's fit, the roofline with a learned correction, and the interpolated profile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Consecutive prompt tokens of one sequence read in a step, after `context_tokens` read before."""

    tokens: int
    context_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepShape:
    """What decides a step's time: the prompt parts, and the sequences that decode one token each.

    `decode_context_tokens` is the sum over those sequences of the tokens whose KV they read.
    """

    prompts: tuple[PromptPart, ...] = ()
    decode_batch: int = 0
    decode_context_tokens: int = 0


class LatencyModel(Protocol):
    """Step times of one worker of one kind (hardware, model, tp, pp); in seconds; all calls pure."""

    def step_s(self, shape: StepShape) -> float:
        """Time of one step, all pipeline stages together; 0 for an empty shape."""
        ...

    def stage_s(self, shape: StepShape) -> float:
        """How soon the next step can begin: the slowest pipeline stage's time; equals step_s without pp."""
        ...

    def decode_run_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """Time of `steps` decode steps of an unchanging batch whose first step reads `context_tokens`.

        Every later step reads `batch` tokens more. Equal to the sum of the single steps up to rounding: a
        model without a closed form must still answer in time that doesn't grow with `steps`.
        """
        ...

    def decode_steps_within(self, batch: int, context_tokens: int, within_s: float) -> int:
        """How many such steps end within `within_s`; the inverse of decode_run_s."""
        ...


class TransferModel(Protocol):
    """Time for KV to get from a prefill worker to a decode worker, hand-over included."""

    def transfer_s(self, tokens: int, same_node: bool) -> float:
        """From the source's acceptance to the sink's commit for the KV of `tokens` tokens."""
        ...


class PieceModel(Protocol):
    """Time for a part of a leg's KV to move while its prompt is still read."""

    def piece_s(self, num_bytes: int, last: bool, same_node: bool) -> float:
        """From the asking for a piece to its bytes being there; for the `last` one, to the sink's commit.

        A hand-off of one piece takes what TransferModel says of it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Caution:
    """Something a reader of a forecast should know: which model left its data, and where."""

    model: str
    message: str


def total_tokens(prompts: Sequence[PromptPart]) -> int:
    """Prompt tokens of a step."""
    return sum(part.tokens for part in prompts)
