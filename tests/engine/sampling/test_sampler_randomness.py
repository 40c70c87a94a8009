"""The random number of a token: where it stands decides it, and nothing else; and it looks random."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from engine.sampling.random_numbers import uniform


@given(st.integers(0, 2**64 - 1), st.integers(0, 15), st.integers(0, 10**6))
def test_uniform_is_in_range_and_repeatable(seed: int, sample: int, index: int) -> None:
    number = uniform(seed, sample, index)
    assert 0.0 <= number < 1.0
    assert number == uniform(seed, sample, index)


def test_numbers_never_change_between_releases() -> None:
    assert [uniform(0, 0, 0), uniform(7, 1, 2)] == [0.31498386745062723, 0.592460915130108]


def test_neighbouring_places_have_different_numbers() -> None:
    places = itertools.product(range(16), range(16), range(64))
    numbers = [uniform(seed, sample, index) for seed, sample, index in places]
    assert len(set(numbers)) == len(numbers)


def test_numbers_are_spread_evenly_and_do_not_follow_one_another() -> None:
    count, bins = 20_000, 100
    numbers = [uniform(1, 0, index) for index in range(count)]
    observed = [0] * bins
    for number in numbers:
        observed[int(number * bins)] += 1
    chi_square = sum((seen - count / bins) ** 2 / (count / bins) for seen in observed)
    assert chi_square < 99 + 4 * math.sqrt(2 * 99)
    products = sum((a - 0.5) * (b - 0.5) for a, b in itertools.pairwise(numbers))
    assert abs(products * 12 / count) < 4 / math.sqrt(count)


def test_every_input_bit_flips_about_half_of_the_output_bits() -> None:
    for place in range(3):
        flips = 0
        for bit, value in itertools.product(range(0, 32), range(20)):
            inputs = [value, value + 1, value + 2]
            before = int(uniform(*inputs) * 2**53)
            inputs[place] ^= 1 << bit
            flips += (before ^ int(uniform(*inputs) * 2**53)).bit_count()
        assert abs(flips / (32 * 20) - 26.5) < 1.0
