"""Trees of guesses hold the most probable paths, most probable branch first."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from engine.drafting.draft import Draft
from engine.drafting.guess_tree import Candidates, best_tree

SHARES = st.lists(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=3, unique=True), min_size=1, max_size=3)


@given(SHARES, st.integers(1, 12))
def test_the_kept_paths_are_the_most_probable_ones(levels: list[list[float]], limit: int) -> None:
    def after(path: tuple[int, ...]) -> Candidates:
        shares = levels[len(path)] if len(path) < len(levels) else []
        return sorted(enumerate(shares), key=lambda candidate: -candidate[1])

    def probability(path: tuple[int, ...]) -> float:
        return math.prod(levels[depth][token] for depth, token in enumerate(path))

    tree = best_tree(after, limit)
    every = [
        path
        for depth in range(1, len(levels) + 1)
        for path in itertools.product(*(range(len(level)) for level in levels[:depth]))
    ]
    kept = [tree.path(index) for index in range(len(tree))]
    assert len(set(kept)) == len(kept) == min(limit, len(every))
    found = sorted(map(probability, kept), reverse=True)
    assert all(map(math.isclose, found, sorted(map(probability, every), reverse=True)))


def test_the_best_branch_comes_first_so_that_its_kv_is_in_place() -> None:
    shares = [[(1, 0.6), (2, 0.4)], [(3, 0.9), (4, 0.1)]]
    tree = best_tree(lambda path: shares[len(path)] if len(path) < 2 else (), 4)
    assert tree == Draft((1, 3, 2, 3), (-1, 0, -1, 2))


def test_without_candidates_there_is_no_guess() -> None:
    assert len(best_tree(lambda _path: (), 4)) == 0
