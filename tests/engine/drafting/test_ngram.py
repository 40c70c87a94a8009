"""Guesses by looking up what followed the sequence's last tokens before."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.drafting.draft import NO_DRAFT
from engine.drafting.ngram import NgramDrafter, NgramIndex

TOKENS = st.lists(st.integers(0, 3), max_size=40)


def followed(tokens: Sequence[int], min_ngram: int, max_ngram: int) -> int | None:
    """Where the longest suffix that occurs earlier went on at its last earlier occurrence, by brute force."""
    for length in range(max_ngram, min_ngram - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[len(tokens) - length :]:
                return end
    return None


@given(TOKENS, st.lists(st.integers(0, 40)), st.integers(1, 3), st.integers(0, 2))
def test_match_is_that_of_a_search_through_all_tokens(
    tokens: list[int], cuts: list[int], min_ngram: int, more: int
) -> None:
    """However the sequence grew."""
    index = NgramIndex(min_ngram, min_ngram + more, 10_000)
    for cut in sorted(cuts):
        seen = tokens[:cut]
        assert index.match(seen) == followed(seen, min_ngram, min_ngram + more)
    assert index.match(tokens) == followed(tokens, min_ngram, min_ngram + more)


@given(TOKENS, st.integers(1, 12))
def test_memory_is_bounded_and_recent_tokens_are_kept(tokens: list[int], most: int) -> None:
    index = NgramIndex(1, 1, most)
    for cut in range(len(tokens) + 1):
        index.match(tokens[:cut])
        assert len(index) <= most
    recent = list(dict.fromkeys(reversed(tokens[:-1])))[: most - 1]
    if tokens and tokens[-1] in recent:
        assert index.match(tokens) == followed(tokens, 1, 1)


def test_guesses_are_what_followed_and_go_round_when_it_ends() -> None:
    drafter = NgramDrafter(min_ngram=2, max_ngram=3)
    assert drafter.propose(1, [7, 8, 9, 1, 7, 8], 3).token_ids == (9, 1, 7)
    assert drafter.propose(1, [7, 8, 9, 1, 7, 8], 9).token_ids == (9, 1, 7, 8, 9, 1, 7, 8, 9)
    assert drafter.propose(2, [5, 5, 5], 4).token_ids == (5, 5, 5, 5)


def test_without_an_earlier_occurrence_nothing_is_guessed() -> None:
    drafter = NgramDrafter(min_ngram=2, max_ngram=3)
    assert drafter.propose(1, [1, 2, 3, 2], 4) == NO_DRAFT
    assert drafter.propose(1, [1, 2, 3, 2, 3], 0) == NO_DRAFT
    assert drafter.propose(1, [1, 2, 3, 2, 3], 2).token_ids == (2, 3)


def test_a_forgotten_sequence_leaves_nothing_to_a_later_one() -> None:
    drafter = NgramDrafter(min_ngram=2, max_ngram=2)
    drafter.propose(1, [1, 2, 3], 4)
    drafter.forget(1)
    drafter.forget(99)
    assert drafter.propose(1, [1, 2], 4) == NO_DRAFT


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="n-grams of 3 to 2"):
        NgramDrafter(min_ngram=3, max_ngram=2)
