"""Pure: what a probe's times say of the cost of hand-offs."""

from dataclasses import replace

import pytest

from benchmarks.live_costs import Alone, PromptTimes, Round, Window, profile_of
from planner.step_times.profile_file import MeasuredStep
from tandem.errors import TandemError
from tests.planner.live_profiles import LONG, SHORT, company

BLOCK = 16
STEP_S, COMPANY = 0.02, 1.5
"""A decode step alone, and how many times as long one is beside a prompt."""


def prompt(tokens: int, join_s: float = 0.0) -> PromptTimes:
    return PromptTimes(
        tokens, tokens / 1000, 0.004, 0.01, -(-tokens // BLOCK) * 1600, 0.01 + 2 * STEP_S + join_s
    )


def batches(seconds: float = STEP_S, context: int = 100) -> tuple[MeasuredStep, ...]:
    return tuple(
        MeasuredStep(decode_batch=batch, decode_context_tokens=context * batch, seconds=seconds)
        for batch in (1, 16)
    )


WITHOUT = Window(
    seconds=100 * STEP_S * COMPANY,
    decode_steps=100,
    context_tokens=100,
    prompt_tokens=SHORT,
    prefill_s=3.0,
    prefill_steps=60,
    answers=60,
)


def measured(*handing: Window, join_s: float = 0.0) -> Round:
    return Round(
        Alone((prompt(10, join_s), prompt(500, join_s)), batches()),
        (company(SHORT, 1, COMPANY, 0.01, 0.005), company(LONG, 16, COMPANY, 0.01, 0.005)),
        tuple((WITHOUT, window) for window in handing),
    )


def test_windows_alike_show_that_handoffs_cost_nothing() -> None:
    profile = profile_of([measured(WITHOUT)], BLOCK)
    assert (profile.handoff_prefill_s, profile.handoff_decode_s) == pytest.approx((0.0, 0.0), abs=1e-9)


def test_what_steps_take_longer_is_shared_among_the_handoffs() -> None:
    handing = replace(WITHOUT, seconds=WITHOUT.seconds + 60 * 0.008, prefill_s=WITHOUT.prefill_s + 60 * 0.006)
    # The prompts are read for as large a share of the time as without hand-offs.
    same_share = replace(handing, prefill_s=WITHOUT.reading * handing.seconds)
    assert profile_of([measured(same_share)], BLOCK).handoff_decode_s == pytest.approx(0.008)
    assert profile_of([measured(handing)], BLOCK).handoff_prefill_s == pytest.approx(0.006)


def test_decodes_that_met_fewer_prompts_were_not_faster_by_themselves() -> None:
    half = replace(WITHOUT, seconds=100 * STEP_S * 1.25, prefill_s=WITHOUT.reading / 2 * 100 * STEP_S * 1.25)
    assert profile_of([measured(half)], BLOCK).handoff_decode_s == pytest.approx(0.0, abs=1e-9)


def test_one_disturbed_window_does_not_count() -> None:
    disturbed = replace(WITHOUT, seconds=10 * WITHOUT.seconds)
    assert profile_of([measured(WITHOUT, disturbed, WITHOUT)], BLOCK).handoff_decode_s == pytest.approx(
        0.0, abs=1e-9
    )


def test_what_the_first_gaps_have_beyond_handoff_and_steps_is_the_joining() -> None:
    assert profile_of([measured(WITHOUT, join_s=0.003)], BLOCK).join_s == pytest.approx(0.003)


def test_rounds_count_alike() -> None:
    first = measured(WITHOUT)
    second = replace(first, alone=replace(first.alone, batches=batches(seconds=0.03, context=102)))
    steps = [point for point in profile_of([first, second], BLOCK).points if point.decode_batch == 1]
    assert [step.seconds for step in steps] == pytest.approx([0.025])
    assert [step.decode_context_tokens for step in steps] == [101]


def test_bytes_of_a_token_are_those_of_whole_blocks() -> None:
    assert profile_of([measured(WITHOUT)], BLOCK).kv_bytes_per_token == 100


def test_a_window_without_an_answer_is_refused() -> None:
    with pytest.raises(TandemError, match="No prompt was answered"):
        profile_of([measured(replace(WITHOUT, answers=0))], BLOCK)
