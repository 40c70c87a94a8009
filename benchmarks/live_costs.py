"""Pure: from what a probe timed to a live profile: what hand-offs cost beside the steps around them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from planner.forecast.live_profile import Company, LiveProfile, beside
from planner.latency import PromptPart, StepShape
from planner.step_times.profile_file import MeasuredStep, MeasuredTransfer
from planner.step_times.profile_model import ProfileModel
from tandem.errors import TandemError


@dataclass(frozen=True, slots=True)
class PromptTimes:
    """Medians of single prompts: the step, what the front door adds to it, the hand-off and its bytes.

    `two_gaps_s` is from the first token to the third.
    """

    tokens: int
    step_s: float
    door_s: float
    handoff_s: float
    handoff_bytes: int
    two_gaps_s: float


@dataclass(frozen=True, slots=True)
class Alone:
    """What was measured with the other worker idle."""

    prompts: tuple[PromptTimes, ...]
    batches: tuple[MeasuredStep, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time in which one stream decoded, and prompts of equal length were read and answered."""

    seconds: float
    decode_steps: int
    context_tokens: int
    prompt_tokens: int
    prefill_s: float
    prefill_steps: float
    answers: int

    @property
    def decode_step_s(self) -> float:
        """The mean step of the decode worker."""
        return self.seconds / self.decode_steps

    @property
    def prefill_step_s(self) -> float:
        """The mean step of the prefill worker."""
        return self.prefill_s / self.prefill_steps

    @property
    def reading(self) -> float:
        """The share of the time in which a prompt was read."""
        return self.prefill_s / self.seconds


@dataclass(frozen=True, slots=True)
class Round:
    """Everything measured once; a pair of windows is without hand-offs and with them."""

    alone: Alone
    company: tuple[Company, ...]
    windows: tuple[tuple[Window, Window], ...]


def profile_of(rounds: Sequence[Round], block_tokens: int) -> LiveProfile:
    """The profile before a rehearsal. Raises TandemError when a window saw no prompt read."""
    prompts = [one for each in rounds for one in each.alone.prompts]
    largest = max(prompts, key=lambda one: one.tokens)
    blocks = -(-largest.tokens // block_tokens)
    profile = LiveProfile(
        version=1,
        kind="tandem profile",
        points=(*map(prompt_point, prompts), *_merged([each.alone.batches for each in rounds])),
        transfers=tuple(map(transfer, prompts)),
        block_size=block_tokens,
        kv_bytes_per_token=largest.handoff_bytes // (blocks * block_tokens),
        front_door_s=statistics.median(one.door_s for one in prompts),
        company=tuple(_merged_company(same) for same in zip(*(each.company for each in rounds), strict=True)),
        join_s=0.0,
        handoff_prefill_s=0.0,
        handoff_decode_s=0.0,
        prefill_unrest_s=0.0,
        decode_unrest_s=0.0,
    )
    pairs = [pair for each in rounds for pair in each.windows]
    if not all(window.prefill_steps and window.answers for pair in pairs for window in pair):
        raise TandemError("No prompt was answered while hand-offs were measured.")
    step, light = ProfileModel(profile), ProfileModel(beside(profile, profile.company[0]))
    prefill_s = [_prefill_cost_s(*pair, light) for pair in pairs]
    decode_s = [_decode_cost_s(*pair, step, light) for pair in pairs]
    return profile.model_copy(
        update={
            "join_s": _join_s(prompts, step),
            "handoff_prefill_s": max(0.0, statistics.median(prefill_s)),
            "handoff_decode_s": max(0.0, statistics.median(decode_s)),
        }
    )


def _merged_company(same: Sequence[Company]) -> Company:
    """The same company of several rounds."""
    prompts = [point for one in same for point in one.points if point.prompts]
    batches = _merged([[point for point in one.points if not point.prompts] for one in same])
    return Company(
        prompt_tokens=same[0].prompt_tokens,
        decode_batch=same[0].decode_batch,
        points=(*prompts, *batches),
        transfers=tuple(moved for one in same for moved in one.transfers),
        front_door_s=statistics.fmean(one.front_door_s for one in same),
    )


def prompt_point(times: PromptTimes) -> MeasuredStep:
    """The step of a prompt as a point of a profile."""
    return MeasuredStep(prompts=((times.tokens, 0),), seconds=times.step_s)


def transfer(times: PromptTimes) -> MeasuredTransfer:
    """Its hand-off."""
    return MeasuredTransfer(transport="live", bytes=times.handoff_bytes, seconds=times.handoff_s)


def _merged(rounds: Sequence[Sequence[MeasuredStep]]) -> list[MeasuredStep]:
    """The means of the same batches timed in several rounds; their contexts differ by some tokens."""
    return [
        MeasuredStep(
            decode_batch=same[0].decode_batch,
            decode_context_tokens=sum(one.decode_context_tokens for one in same) // len(same),
            seconds=statistics.fmean(one.seconds for one in same),
            runs=sum(one.runs for one in same),
        )
        for same in zip(*rounds, strict=True)
    ]


def _join_s(prompts: Sequence[PromptTimes], step: ProfileModel) -> float:
    """What the first two gaps of an answer have beside the hand-off and two steps of a steady batch."""
    left_s = [one.two_gaps_s - one.handoff_s - step.decode_run_s(1, one.tokens + 1, 2) for one in prompts]
    return max(0.0, statistics.median(left_s))


def _decode_cost_s(without: Window, handing: Window, step: ProfileModel, light: ProfileModel) -> float:
    """What a hand-off adds to the decode worker's step, beside company and the step of a sequence more."""
    slower = without.decode_step_s / step.decode_run_s(1, without.context_tokens, 1)
    slower = 1 + (slower - 1) * handing.reading / without.reading
    expected_s = slower * step.decode_run_s(1, handing.context_tokens, 1)
    context = handing.context_tokens
    two = StepShape((), 2, context + handing.prompt_tokens)
    one_more_s = light.step_s(two) - light.step_s(StepShape((), 1, context))
    extra_s = (handing.decode_step_s - expected_s) * handing.decode_steps / handing.answers
    return extra_s - one_more_s


def _prefill_cost_s(without: Window, handing: Window, light: ProfileModel) -> float:
    """What a hand-off adds to the prefill worker's step; some steps read two prompts."""
    together = round(handing.prompt_tokens * handing.answers / handing.prefill_steps)
    longer_s = _prompt_s(light, together) - _prompt_s(light, without.prompt_tokens)
    extra_s = handing.prefill_step_s - without.prefill_step_s - longer_s
    return extra_s * handing.prefill_steps / handing.answers


def _prompt_s(model: ProfileModel, tokens: int) -> float:
    return model.step_s(StepShape((PromptPart(max(1, tokens)),)))
