"""Which guesses hold, and where their KV lies."""

from hypothesis import given
from hypothesis import strategies as st

from engine.drafting.draft import (
    NO_DRAFT,
    ROOT,
    Draft,
    accepted_rows,
    in_place,
    row_in_slice,
    row_of_draft,
)

TREE = Draft((10, 11, 12, 20, 21), (ROOT, 0, 1, ROOT, 3))
"""10-11-12 and 20-21."""


@st.composite
def trees(draw: st.DrawFn) -> Draft:
    """Any tree over three tokens whose siblings differ."""
    taken: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(0, 8))):
        guess = (draw(st.integers(ROOT, len(taken) - 1)), draw(st.integers(0, 2)))
        if guess not in taken:
            taken.append(guess)
    return Draft(tuple(token for _, token in taken), tuple(parent for parent, _ in taken))


def test_output_goes_on_as_long_as_the_model_draws_what_was_guessed() -> None:
    chain = Draft((5, 6, 7))
    assert accepted_rows(chain, {0: 5, 1: 6, 2: 9, 3: 1}) == [0, 1, 2]
    assert accepted_rows(chain, {0: 9, 1: 6, 2: 7, 3: 1}) == [0]
    assert accepted_rows(chain, {0: 5, 1: 6, 2: 7, 3: 1}) == [0, 1, 2, 3]


def test_output_may_go_along_any_branch() -> None:
    assert accepted_rows(TREE, {0: 20, 1: 0, 2: 0, 3: 0, 4: 21, 5: 3}) == [0, 4, 5]
    assert accepted_rows(TREE, {0: 10, 1: 11, 2: 5, 3: 0, 4: 0, 5: 0}) == [0, 1, 2]


def test_output_ends_where_nothing_could_be_drawn() -> None:
    assert accepted_rows(Draft((5, 6)), {0: 5, 2: 7}) == [0]
    assert accepted_rows(NO_DRAFT, {}) == []


def test_only_guesses_right_after_the_sequence_have_their_kv_in_place() -> None:
    assert in_place([0, 1, 2]) == 2
    assert in_place([0, 4, 5]) == 0
    assert in_place([0, 1, 3, 4]) == 1
    assert in_place([0]) == 0


def test_rows_of_a_draft_are_counted_from_the_end_of_its_slice() -> None:
    slice_tokens = [1, 2, *TREE.token_ids]
    assert slice_tokens[row_in_slice(TREE, 0)] == 2
    assert [slice_tokens[row_in_slice(TREE, row)] for row in range(1, 6)] == list(TREE.token_ids)
    assert [row_of_draft(TREE, row_in_slice(TREE, row)) for row in range(6)] == list(range(6))


@given(trees(), st.integers(0, 8), st.lists(st.integers(0, 2), min_size=10, max_size=10))
def test_accepted_tokens_are_those_drawn_one_at_a_time(tree: Draft, count: int, language: list[int]) -> None:
    """The model draws language[depth]; any first part of a tree is a tree whose accepted path spells it."""
    part = tree.first(count)
    depths = [0, *part.depths()]
    drawn = {row: language[depth] for row, depth in enumerate(depths)}
    rows = accepted_rows(part, drawn)
    assert [depths[row] for row in rows] == list(range(len(rows)))
    for row in rows:
        assert list(part.path(row - 1)) == language[: depths[row]]
    longest = max(
        (depth for at, depth in enumerate(depths[1:]) if list(part.path(at)) == language[:depth]), default=0
    )
    assert len(rows) == longest + 1
