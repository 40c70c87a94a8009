"""A latency model whose times are sums of powers of two, so that no order of adding them matters."""

import math
from dataclasses import dataclass

from planner.latency import StepShape, total_tokens

TICK_S = 2.0**-20


@dataclass(frozen=True, slots=True)
class LinearLatency:
    """Ticks of a step: a base, so many for each prompt token, each sequence, each context token."""

    base: int = 4096
    per_prompt_token: int = 64
    per_sequence: int = 32
    per_context_token: float = 2.0**-6

    def step_s(self, shape: StepShape) -> float:
        """Linear in everything."""
        if not shape.prompts and not shape.decode_batch:
            return 0.0
        ticks = self.base + self.per_prompt_token * total_tokens(shape.prompts)
        ticks += self.per_sequence * shape.decode_batch
        return (ticks + self.per_context_token * shape.decode_context_tokens) * TICK_S

    def stage_s(self, shape: StepShape) -> float:
        """One stage."""
        return self.step_s(shape)

    def decode_run_s(self, batch: int, context_tokens: int, steps: int) -> float:
        """An arithmetic series."""
        first = self.base + self.per_sequence * batch + self.per_context_token * context_tokens
        growth = self.per_context_token * batch
        return (steps * first + growth * (steps * (steps - 1) // 2)) * TICK_S

    def decode_steps_within(self, batch: int, context_tokens: int, within_s: float) -> int:
        """By the quadratic formula."""
        half = self.per_context_token * batch / 2
        first = self.base + self.per_sequence * batch + self.per_context_token * context_tokens - half
        ticks = within_s / TICK_S
        if half == 0:
            return int(ticks / first)
        return int((math.sqrt(first * first + 4 * half * ticks) - first) / (2 * half))


@dataclass(frozen=True, slots=True)
class LinearTransfer:
    """A latency, and so many ticks a token; twice that between nodes."""

    base: int = 2048
    per_token: int = 4

    def transfer_s(self, tokens: int, same_node: bool) -> float:
        """Linear in the tokens."""
        return (self.base + self.per_token * tokens * (1 if same_node else 2)) * TICK_S

    def piece_s(self, num_bytes: int, last: bool, same_node: bool) -> float:
        """The latency for the last piece, and for each byte what a token takes for its 32 KiB."""
        ticks = self.per_token * (num_bytes >> 15) * (1 if same_node else 2)
        return ((self.base if last else 0) + ticks) * TICK_S
