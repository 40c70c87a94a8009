"""Pure: the most promising tree of guesses, given how probable each candidate is."""

import heapq
from collections.abc import Callable, Sequence

from engine.drafting.draft import ROOT, Draft

Candidates = Sequence[tuple[int, float]]
"""Tokens that may come next and their probabilities, best first."""


def best_tree(after: Callable[[tuple[int, ...]], Candidates], limit: int) -> Draft:
    """The `limit` guesses with the most probable paths, as a tree; most probable branches first.

    `after` gives the candidates that follow a path of guesses (() is the sequence itself). After Medusa's
    sparse trees (Cai et al. 2024) and EAGLE-2's dynamic ones (Li et al. 2024): a path is as probable as its
    tokens together, so a guess is never kept without those before it.
    """
    children: dict[tuple[int, ...], list[int]] = {(): []}
    heap: list[tuple[float, tuple[int, ...]]] = []

    def open_node(path: tuple[int, ...], probability: float) -> None:
        for token_id, share in after(path):
            heapq.heappush(heap, (-probability * share, (*path, token_id)))

    open_node((), 1.0)
    while heap and limit > 0:
        negative, path = heapq.heappop(heap)
        children[path[:-1]].append(path[-1])
        children[path] = []
        limit -= 1
        if limit > 0:
            open_node(path, -negative)
    return _in_depth_first_order(children)


def _in_depth_first_order(children: dict[tuple[int, ...], list[int]]) -> Draft:
    """So that the most probable branch has its KV in place."""
    token_ids: list[int] = []
    parents: list[int] = []
    pending: list[tuple[tuple[int, ...], int]] = [((), ROOT)]
    while pending:
        path, at = pending.pop()
        if path:
            token_ids.append(path[-1])
            parents.append(at)
            at = len(token_ids) - 1
        pending.extend(((*path, token_id), at) for token_id in reversed(children[path]))
    return Draft(tuple(token_ids), tuple(parents))
