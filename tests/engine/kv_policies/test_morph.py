"""MorphKV keeps the newest tokens and those that they attended to most, in every layer and head by itself."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from torch import Tensor

from engine.attention import Span
from engine.kv.blocks import BlockPool
from engine.kv.kv_cache import KvCache
from engine.kv_policies.bounded_kv import BoundedKv, KvBudget, KvDrop, KvDrops
from engine.kv_policies.bounded_sequence import BoundedSequence
from engine.kv_policies.page_attention import PageAttention, Reading
from engine.kv_policies.paged_rows import PagedRows
from engine.kv_policies.recent_attention import RecentAttention, kept_slots
from engine.step import SequenceSlice, StepPlan
from tandem.ids import BlockId
from tests.engine.kv_policies.page_engine import open_pages, team_of, tokens
from tests.engine.kv_policies.test_quest import BLOCKS, CONFIG, GROUP, HEAD_DIM, KV_HEADS, LAYERS, SIZE
from tests.engine.tiny_models import family_configs, random_model, slice_of

CPU = torch.device("cpu")
STORED = {"float32": torch.float32, "int8": torch.int8}
BUDGET = KvBudget(tokens=16, window=4)
HEADS = KV_HEADS * GROUP


def _random(count: int, heads: int, seed: int) -> Tensor:
    return torch.randn((count, heads, HEAD_DIM), generator=torch.Generator().manual_seed(seed))


class _Fed:
    """One sequence's queries, keys and values in all layers, fed to a PageAttention."""

    def __init__(self, attention: PageAttention, length: int, table: list[BlockId]) -> None:
        self.attention = attention
        self.table = table
        self.rows = [
            (_random(length, HEADS, 3 * layer), _random(length, KV_HEADS, 3 * layer + 1),
             _random(length, KV_HEADS, 3 * layer + 2))
            for layer in range(LAYERS)
        ]  # fmt: skip

    def feed(self, first: int, count: int, dropped: int = 0, watched: bool = False) -> list[Tensor]:
        """What tokens attended to in each layer, [count, heads * head_dim]."""
        span = Span(0, count, first - dropped, self.table, bounded=BoundedKv(7, dropped, watched))
        batch = self.attention.prepare([span])
        own = slice(first, first + count)
        return [batch(layer, *(part[own] for part in rows)).clone() for layer, rows in enumerate(self.rows)]


@contextmanager
def _attention(
    stored: torch.dtype, largest: bool = False, threads: int = 1
) -> Iterator[tuple[PageAttention, PagedRows]]:
    with KvCache(CONFIG, BLOCKS, SIZE, stored, CPU) as cache:
        team = team_of(threads)
        yield (
            PageAttention(cache, CONFIG, team, Reading(budget=BUDGET, largest=largest)),
            PagedRows(cache, CONFIG, team),
        )


def _stored(rows: PagedRows, layer: int, table: list[BlockId], held: int) -> list[NDArray[np.float64]]:
    """K and V as they are stored, each [held, kv_heads, head_dim]."""
    return [part[:held].double().numpy() for part in rows.read(layer, table)]


def _weights(query: Tensor, keys: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 softmax of one token's queries [heads, head_dim]: [kv_heads, group, keys]."""
    grouped = query.double().numpy().reshape(KV_HEADS, GROUP, HEAD_DIM)
    scores = np.einsum("hgd,khd->hgk", grouped, keys) / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    normalised: NDArray[np.float64] = weights / weights.sum(axis=2, keepdims=True)
    return normalised


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@pytest.mark.parametrize("largest", [False, True], ids=["sum", "max"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_tokens_that_stay_are_those_of_float64(stored: torch.dtype, largest: bool, threads: int) -> None:
    """A prompt of 20 tokens, a window of four fed one by one; then 12 stay, in blocks of their own."""
    table = [BlockId(block) for block in random.Random(0).sample(range(BLOCKS), 9)]
    prompt, held = 20, 24
    with _attention(stored, largest, threads) as (attention, rows):
        fed = _Fed(attention, held + 1, table[:6])
        fed.feed(0, prompt)
        for at in range(prompt, held):
            fed.feed(at, 1, watched=True)
        before = [_stored(rows, layer, table[:6], held) for layer in range(LAYERS)]
        drop = KvDrop(7, held, BUDGET.kept, tuple(table[:6]), tuple(table[6:]))
        attention.begin_step(StepPlan(0, (), drops=KvDrops((drop,))))
        fed.table = [*table[6:], table[0]]
        found = fed.feed(held, 1, dropped=held - BUDGET.kept, watched=True)
        for layer in range(LAYERS):
            keys, values = before[layer]
            kept = _expected(fed.rows[layer][0][prompt:held], keys, prompt, largest)
            after = _stored(rows, layer, fed.table, BUDGET.kept + 1)
            for head in range(KV_HEADS):
                assert (after[0][:-1, head] == keys[kept[head], head]).all()
                assert (after[1][:-1, head] == values[kept[head], head]).all()
            weights = _weights(fed.rows[layer][0][held], after[0])
            mixed = np.einsum("hgk,khd->hgd", weights, after[1]).reshape(-1)
            assert np.abs(found[layer][0].double().numpy() - mixed).max() < 1e-5
        del rows, attention, fed


def _expected(
    queries: Tensor, keys: NDArray[np.float64], prompt: int, largest: bool
) -> list[NDArray[np.int64]]:
    """Of each K/V head: the window, and the others with the largest attention of the window's tokens."""
    per_token = np.zeros((len(queries), KV_HEADS, len(keys)))
    for place, query in enumerate(queries):
        end = prompt + place + 1
        per_token[place, :, :end] = _weights(query, keys[:end]).sum(axis=1)
    scores = per_token.max(axis=0) if largest else per_token.sum(axis=0)
    old = len(keys) - BUDGET.window
    chosen = np.argsort(-scores[:, :old], axis=1)[:, : BUDGET.kept - BUDGET.window]
    return [np.concatenate((np.sort(own), np.arange(old, len(keys)))) for own in chosen]


@settings(max_examples=100, deadline=None)
@given(
    scores=arrays.arrays(
        np.float32,
        st.tuples(st.just(2), st.just(1), st.integers(4, 30)),
        elements=st.sampled_from([0.0, 1.0, 2.0, 3.0]),
    ),
    data=st.data(),
)
def test_a_window_and_the_highest_scores_stay_in_order(
    scores: NDArray[np.float32], data: st.DataObject
) -> None:
    held = scores.shape[2]
    window = data.draw(st.integers(1, held))
    keep = data.draw(st.integers(window, held))
    found = kept_slots(torch.from_numpy(scores), keep, window).numpy()
    assert found.shape == (2, 1, keep)
    assert (np.diff(found) > 0).all()
    assert (found[:, :, keep - window :] == np.arange(held - window, held)).all()
    for own, kept in zip(scores[:, 0], found[:, 0], strict=True):
        old = own[: held - window]
        chosen = kept[: keep - window]
        left = np.setdiff1d(np.arange(held - window), chosen)
        for other in left:
            worse = chosen[old[chosen] <= old[other]]
            assert (old[worse] == old[other]).all()
            assert (worse < other).all(), "of equals the earlier stays"


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.integers(1, 90), window=st.integers(1, 12), more=st.integers(0, 30), size=st.integers(1, 8),
    cached=st.booleans(),
)  # fmt: skip
def test_a_sequence_keeps_to_its_budget_whatever_the_sizes(
    prompt: int, window: int, more: int, size: int, cached: bool
) -> None:
    """Fed one by one, as the scheduler does it: slots, blocks and positions add up in every step."""
    budget, pool = KvBudget(2 * window + more, window), BlockPool(200, size)
    table = list(pool.allocate(pool.blocks_for(prompt)))
    if cached:
        pool.publish(tuple(range(prompt)), table)
    sequence = BoundedSequence(0)
    for computed in range(prompt, prompt + 3 * window + more):
        held = computed - sequence.dropped
        planned = sequence.drop(pool, budget, table, computed, 1)
        if planned is not None:
            drop, leaving = planned
            assert (drop.held, drop.keep) == (held, budget.kept)
            assert len(drop.target) == pool.blocks_for(budget.kept)
            assert all(pool.private(block) for block in drop.target)
            pool.release(leaving)
        held = computed - sequence.dropped
        table += pool.allocate(max(0, pool.blocks_for(held + 1) - len(table)))
        assert len(table) == pool.blocks_for(held + 1)
        assert held + 1 <= max(budget.tokens, prompt + window)
        assert held + 1 <= budget.tokens or computed < prompt + window
        sequence.fed(budget, computed, 1)
        pool.check_integrity([table])


def test_scores_are_forgotten_with_the_sequence_and_begin_anew_after_a_drop() -> None:
    with KvCache(CONFIG, BLOCKS, SIZE, torch.float32, CPU) as cache:
        rows = PagedRows(cache, CONFIG, team_of(1))
        recent = RecentAttention(rows, team_of(1), BUDGET, largest=False)
        recent.scores(1, 10)[:] = 1.0
        known = recent.scores(1, 10).shape[2]
        wider = recent.scores(1, known + 1)
        assert wider[:, :, :known].min() == 1.0, "what is known stays when there are more slots"
        assert not wider[:, :, known:].any()
        recent.scores(2, 10)
        table = tuple(BlockId(block) for block in range(5))
        recent.begin_step(KvDrops((KvDrop(1, 17, 12, table, table[:3]),), ended=(2, 3)))
        assert len(recent) == 0
        assert not recent.scores(1, 13).any()
        with pytest.raises(KeyError):
            recent.begin_step(KvDrops((KvDrop(9, 17, 12, table, table[:3]),)))
        del rows, recent


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    folder = tmp_path_factory.mktemp("llama")
    random_model(family_configs()["llama"]).save_pretrained(folder)
    return folder


def _bounded(part: SequenceSlice, bounded: BoundedKv) -> SequenceSlice:
    return SequenceSlice(part.token_ids, part.start, part.block_table, part.samples, bounded=bounded)


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_up_to_the_budget_logits_are_those_of_full_attention(llama: Path, stored: torch.dtype) -> None:
    sequence, table = tokens(17, seed=8), [BlockId(block) for block in range(5)]
    with open_pages(llama, stored, Reading(budget=BUDGET)) as bounded, open_pages(llama, stored) as full:
        for engine in (bounded, full):
            engine.step(slice_of(sequence[:9], 0, table, samples=0))
        for at in range(9, 16):
            part = slice_of(sequence[at : at + 1], at, table)
            expected = full.step(part)
            watched = BoundedKv(0, 0, BUDGET.watches(at, 1))
            assert torch.equal(bounded.step(_bounded(part, watched)), expected)


def test_a_dropped_token_is_seen_no_more_and_positions_go_on(llama: Path) -> None:
    """After a drop logits differ from full attention's, and from those of a token at its slot's position."""
    sequence, table = tokens(30, seed=9), [BlockId(block) for block in range(8)]
    found = []
    for dropped in (12, 0):
        with open_pages(llama, reading=Reading(budget=BUDGET)) as engine:
            engine.step(slice_of(sequence[:20], 0, table, samples=0))
            for at in range(20, 24):
                engine.step(_bounded(slice_of(sequence[at : at + 1], at, table), BoundedKv(0, 0, True)))
            drop = KvDrop(0, 24, 12, tuple(table[:6]), tuple(table[:3]))
            part = slice_of(sequence[24:25], 12, table)
            found.append(engine.step(_bounded(part, BoundedKv(0, dropped, True)), drops=KvDrops((drop,))))
    with open_pages(llama) as engine:
        full = engine.step(slice_of(sequence[:25], 0, table))
    assert (found[0] - full).abs().max() > 1e-4
    assert (found[0] - found[1]).abs().max() > 1e-4
