"""Sums over growing sequences agree with counting each of them."""

from hypothesis import given
from hypothesis import strategies as st

from engine.kv.length_sums import LengthSums

SIZE = 4
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def blocks(tokens: int) -> int:
    return -(-tokens // SIZE)


def grown(lengths: list[int], steps: int) -> int:
    return sum(blocks(length + steps) - blocks(length) for length in lengths)


@given(LENGTHS, st.integers(0, 50), st.integers(0, 50))
def test_growth_is_what_the_sequences_need(lengths: list[int], before: int, steps: int) -> None:
    sums = LengthSums(SIZE)
    for length in lengths:
        sums.join(length)
    assert sums.growth(before) == grown(lengths, before)
    sums.take(before)
    later = [length + before for length in lengths]
    assert sums.growth(steps) == grown(later, steps)
    assert sums.growth_next() == grown(later, 1)
    assert sums.context_tokens == sum(length + 1 for length in later)


@given(LENGTHS, st.integers(0, 60), st.integers(0, 60))
def test_steps_with_blocks_are_as_many_as_the_blocks_suffice_for(
    lengths: list[int], free: int, most: int
) -> None:
    sums = LengthSums(SIZE)
    for length in lengths:
        sums.join(length)
    steps = sums.steps_with_blocks(free, most)
    assert grown(lengths, steps) <= free
    assert steps == most or grown(lengths, steps + 1) > free


@given(LENGTHS, st.integers(0, 30))
def test_what_left_is_counted_no_more(lengths: list[int], steps: int) -> None:
    sums = LengthSums(SIZE)
    for length in lengths:
        sums.join(length)
    sums.take(steps)
    for length in lengths:
        sums.leave(length + steps)
    assert (sums.count, sums.context_tokens, sums.growth(SIZE)) == (0, 0, 0)
