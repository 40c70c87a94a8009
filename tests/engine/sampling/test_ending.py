"""When a sample ends, and which tokens may not be drawn before it may."""

import pytest

from engine.sampling.ending import Ending, banned_tokens, ending_after
from tandem.sampling import FinishReason, SamplingParams

EOS = (2, 3)
STOP = FinishReason.STOP
LENGTH = Ending(FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("params", "token_id", "output_index", "total_tokens", "expected"),
    [
        (SamplingParams(), 7, 0, 10, None),
        (SamplingParams(), 2, 0, 10, Ending(STOP, 2)),
        (SamplingParams(), 3, 5, 10, Ending(STOP, 3)),
        (SamplingParams(ignore_eos=True), 2, 0, 10, None),
        (SamplingParams(ignore_eos=True, stop_token_ids=(2,)), 2, 0, 10, Ending(STOP, 2)),
        (SamplingParams(stop_token_ids=(9,)), 9, 0, 10, Ending(STOP, 9)),
        (SamplingParams(max_tokens=1), 7, 0, 10, LENGTH),
        (SamplingParams(max_tokens=2), 7, 0, 10, None),
        (SamplingParams(max_tokens=2), 7, 1, 10, LENGTH),
        (SamplingParams(max_tokens=1), 2, 0, 10, Ending(STOP, 2)),
        (SamplingParams(), 7, 3, 100, LENGTH),
        (SamplingParams(), 7, 3, 99, None),
        (SamplingParams(min_tokens=2), 2, 1, 10, None),
        (SamplingParams(min_tokens=2), 2, 2, 10, Ending(STOP, 2)),
    ],
)
def test_ending_after_a_token(
    params: SamplingParams, token_id: int, output_index: int, total_tokens: int, expected: Ending | None
) -> None:
    ending = ending_after(
        params, token_id, output_index, total_tokens=total_tokens, context_tokens=100, eos_ids=EOS
    )
    assert ending == expected


def test_tokens_that_would_end_are_banned_until_min_tokens() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(9, 3))
    assert banned_tokens(params, 0, EOS) == (2, 3, 9)
    assert banned_tokens(params, 1, EOS) == (2, 3, 9)
    assert banned_tokens(params, 2, EOS) == ()


def test_ignored_eos_is_not_banned() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(9,), ignore_eos=True)
    assert banned_tokens(params, 0, EOS) == (9,)
