"""Pure: two workers that slow each other down on one machine.

What a step needs is its time alone on the machine. It is worked off at full pace while the other worker
rests, and beside a step of the other at the pace that was measured beside steps of that size. A hand-off
adds what it costs to the steps under way. A step is planned to end as early as it can; when it is due, the
machine says what is left.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf, log

from planner.forecast.live_profile import LiveProfile, beside, transfer_model
from planner.latency import StepShape, total_tokens
from planner.step_times.profile_model import ProfileModel

_DONE_S = 1e-6
"""What counts as nothing left, so that a step ends after a few looks."""


class Side(Enum):
    """The two workers."""

    PREFILL = "prefill"
    DECODE = "decode"


_OTHER = {Side.PREFILL: Side.DECODE, Side.DECODE: Side.PREFILL}


@dataclass(slots=True)
class _Step:
    """A step under way, and what is left of it at the pace of a worker alone."""

    shape: StepShape
    left_s: float


class SharedMachine:
    """Owns how far the step of each worker is. `now_s` is given once the simulation exists."""

    def __init__(self, profile: LiveProfile) -> None:
        self.now_s: Callable[[], float] = lambda: 0.0
        profiles = [beside(profile, one) for one in profile.company]
        self._alone, self._company = ProfileModel(profile), [ProfileModel(one) for one in profiles]
        self._link, self._links = transfer_model(profile), [transfer_model(one) for one in profiles]
        self._join_s = profile.join_s
        self._unrest_s = {Side.PREFILL: profile.prefill_unrest_s, Side.DECODE: profile.decode_unrest_s}
        self._costs = {Side.PREFILL: profile.handoff_prefill_s, Side.DECODE: profile.handoff_decode_s}
        self._prompts = [one.prompt_tokens for one in profile.company]
        self._batches = [one.decode_batch for one in profile.company]
        self._steps: dict[Side, _Step] = {}
        self._at_s = 0.0
        self._owed_until_s = dict.fromkeys(Side, -inf)

    def begin(self, side: Side, shape: StepShape) -> float:
        """A worker begins a step; gives the earliest that it can take. Idempotent in an instant."""
        self._advance()
        alone_s = self._unrest_s[side] + self._alone.step_s(shape)
        owed = self.now_s() < self._owed_until_s[side]
        self._steps[side] = _Step(shape, alone_s + (self._costs[side] if owed else 0.0))
        return alone_s

    def left_s(self, side: Side) -> float:
        """What a step that is due still needs, alone; at 0 it is over, and the worker rests."""
        self._advance()
        left_s = self._steps[side].left_s
        if left_s > _DONE_S:
            return left_s
        del self._steps[side]
        self._owed_until_s[side] = -inf
        return 0.0

    def hand_over(self, tokens: int) -> float:
        """A hand-off begins; gives its time to the first decode step. It adds to the steps that it meets."""
        self._advance()
        took_s = self._join_s + self._handoff_s(tokens)
        for side in Side:
            step = self._steps.get(side)
            if step is None:
                self._owed_until_s[side] = self.now_s() + took_s
            else:
                step.left_s += self._costs[side]
        return took_s

    def _advance(self) -> None:
        """Works off the steps under way up to now."""
        now_s = self.now_s()
        passed_s, self._at_s = now_s - self._at_s, now_s
        if passed_s > 0:
            paces = [(step, self._pace(side, step)) for side, step in self._steps.items()]
            for step, pace in paces:
                step.left_s = max(0.0, step.left_s - passed_s * pace)

    def _pace(self, side: Side, step: _Step) -> float:
        """How much of a step is done in a second."""
        other = self._steps.get(_OTHER[side])
        if other is None:
            return 1.0
        if side is Side.DECODE:
            sizes, size = self._prompts, total_tokens(other.shape.prompts)
        else:
            sizes, size = self._batches, other.shape.decode_batch
        times_s = [model.step_s(step.shape) for model in self._company]
        return min(1.0, self._alone.step_s(step.shape) / between(sizes, times_s, size))

    def _handoff_s(self, tokens: int) -> float:
        decoding = self._steps.get(Side.DECODE)
        if decoding is None:
            return self._link.transfer_s(tokens, same_node=True)
        times_s = [link.transfer_s(tokens, same_node=True) for link in self._links]
        return between(self._batches, times_s, decoding.shape.decode_batch)


def between(sizes: Sequence[int], values: Sequence[float], size: int) -> float:
    """Between the values at ascending `sizes`, linear in the size's logarithm; beyond, the outer ones."""
    right = bisect_right(sizes, size)
    if right == 0 or right == len(sizes):
        return values[max(0, right - 1)]
    low, high = sizes[right - 1], sizes[right]
    share = log(size / low) / log(high / low)
    return values[right - 1] + share * (values[right] - values[right - 1])


class MachineSteps:
    """LatencyModel of one of the workers; it must be asked when a step begins, and not in between."""

    def __init__(self, machine: SharedMachine, side: Side, alone: ProfileModel) -> None:
        self._machine, self._side = machine, side
        self.decode_run_s = alone.decode_run_s
        self.decode_steps_within = alone.decode_steps_within

    def step_s(self, shape: StepShape) -> float:
        """See LatencyModel; the earliest that the step can end."""
        return self._machine.begin(self._side, shape)

    def stage_s(self, shape: StepShape) -> float:
        """See LatencyModel; one stage."""
        return self.step_s(shape)

    def left_s(self) -> float:
        """See WorkerSpec."""
        return self._machine.left_s(self._side)


@dataclass(frozen=True, slots=True)
class MachineTransfer:
    """TransferModel of the pair; a hand-off is asked for when it begins."""

    machine: SharedMachine

    def transfer_s(self, tokens: int, same_node: bool) -> float:
        """See TransferModel."""
        return self.machine.hand_over(tokens)
