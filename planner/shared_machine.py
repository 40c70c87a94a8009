"""Pure: step times and hand-offs of two workers that slow each other down on one machine.

Whoever begins a step looks whether the other one is at work. A decode worker at work is taken to stay so: its
steps follow each other. A prompt's step ends when it ends, and what is left of a decode step goes on at the
pace of a worker alone. A step that the other worker joins half way keeps its time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from planner.latency import StepShape, TransferModel
from planner.profile_model import ProfileModel


@dataclass(slots=True)
class SharedMachine:
    """Until when each worker is at work, on the clock that is given once the simulation exists."""

    now_s: Callable[[], float] = field(default=lambda: 0.0)
    prefill_until_s: float = -math.inf
    decode_until_s: float = -math.inf

    @property
    def decode_works(self) -> bool:
        """Whether a decode step is under way, or ends at this instant."""
        return self.decode_until_s >= self.now_s()


class PromptSteps:
    """LatencyModel of the prefill worker. It must be asked when a step begins, and not in between."""

    def __init__(self, machine: SharedMachine, alone: ProfileModel, company: ProfileModel) -> None:
        self._machine, self._alone, self._company = machine, alone, company

    def step_s(self, shape: StepShape) -> float:
        """See LatencyModel."""
        model = self._company if self._machine.decode_works else self._alone
        took_s = model.step_s(shape)
        self._machine.prefill_until_s = self._machine.now_s() + took_s
        return took_s

    def stage_s(self, shape: StepShape) -> float:
        """See LatencyModel; one stage."""
        return self.step_s(shape)

    def decode_run_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """See LatencyModel; of a worker alone, for runs of steps are not simulated here."""
        return self._alone.decode_run_s(batch, context_tokens, steps)

    def decode_steps_within(self, batch: int, context_tokens: int, within_s: float) -> int:
        """See LatencyModel; of a worker alone."""
        return self._alone.decode_steps_within(batch, context_tokens, within_s)


class DecodeSteps(PromptSteps):
    """LatencyModel of the decode worker, asked in the same way."""

    def step_s(self, shape: StepShape) -> float:
        """See LatencyModel."""
        now_s = self._machine.now_s()
        alone_s, company_s = self._alone.step_s(shape), self._company.step_s(shape)
        together_s = min(company_s, max(0.0, self._machine.prefill_until_s - now_s))
        took_s = together_s + (1.0 - together_s / company_s) * alone_s
        self._machine.decode_until_s = now_s + took_s
        return took_s


@dataclass(frozen=True, slots=True)
class SharedTransfer:
    """TransferModel that looks whether the decode worker is at work."""

    machine: SharedMachine
    alone: TransferModel
    company: TransferModel

    def transfer_s(self, tokens: int, same_node: bool) -> float:
        """See TransferModel."""
        model = self.company if self.machine.decode_works else self.alone
        return model.transfer_s(tokens, same_node)
