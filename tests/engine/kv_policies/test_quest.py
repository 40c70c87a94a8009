"""Quest reads the pages whose bounds are largest, and its bounds hold whatever happened to the blocks."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from engine.attention import Span
from engine.kv.kv_cache import KvCache
from engine.kv_policies.page_attention import PageAttention, Reading
from engine.kv_policies.page_bounds import FULL_LAYERS, PageBounds
from engine.kv_policies.paged_rows import PagedRows, Places
from engine.models.model_config import ModelConfig, RopeConfig
from engine.native.kernels.pages import choose_pages, largest_places
from tandem.ids import BlockId
from tests.engine.kv_policies.page_engine import open_pages, scattered, team_of, tokens
from tests.engine.tiny_models import family_configs, random_model, slice_of

SIZE, KV_HEADS, GROUP, HEAD_DIM, LAYERS, BLOCKS = 4, 2, 3, 8, 3, 12
CONFIG = ModelConfig(
    "LlamaForCausalLM",
    10,
    8,
    8,
    LAYERS,
    KV_HEADS * GROUP,
    KV_HEADS,
    HEAD_DIM,
    1e-5,
    RopeConfig(1e4),
    64,
    True,
    *(False,) * 4,
    (None,) * LAYERS,
    (),
)
CPU = torch.device("cpu")
STORED = {"float32": torch.float32, "int8": torch.int8}
LAYER = LAYERS - 1


def _random_kv(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, KV_HEADS, HEAD_DIM)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _keys_of(rows: PagedRows, block: int) -> NDArray[np.float32]:
    """Keys as stored, [block_size, kv_heads, head_dim]."""
    keys: NDArray[np.float32] = rows.read(LAYER, [BlockId(block)])[0].numpy()
    return keys


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_a_token_attends_to_the_pages_with_the_largest_bounds_only(stored: torch.dtype) -> None:
    """Against float64 attention over a choice made by numpy from the stored keys."""
    length, pages = 43, 4
    with KvCache(CONFIG, BLOCKS, SIZE, stored, CPU) as cache:
        attention = PageAttention(cache, CONFIG, team_of(1), Reading(pages))
        table = [BlockId(block) for block in random.Random(0).sample(range(BLOCKS), 11)]
        keys, values = _random_kv(length, seed=1)
        queries = torch.randn(
            (length, KV_HEADS * GROUP, HEAD_DIM), generator=torch.Generator().manual_seed(2)
        )
        attention.prepare([Span(0, length - 1, 0, table)])(LAYER, queries[:-1], keys[:-1], values[:-1])
        batch = attention.prepare([Span(0, 1, length - 1, table)])
        found = batch(LAYER, queries[-1:], keys[-1:], values[-1:]).view(KV_HEADS, GROUP, HEAD_DIM)
        rows = PagedRows(cache, CONFIG, team_of(1))
        seen = [part[:length].double().numpy() for part in rows.read(LAYER, table)]
        for head in range(KV_HEADS):
            own = queries[-1].view(KV_HEADS, GROUP, HEAD_DIM)[head].double().numpy()
            expected = _attend(own, seen[0][:, head], seen[1][:, head], pages)
            assert np.abs(found[head].double().numpy() - expected).max() < 1e-5
        del rows, attention, batch


def _attend(
    queries: NDArray[np.float64], keys: NDArray[np.float64], values: NDArray[np.float64], pages: int
) -> NDArray[np.float64]:
    """A group's queries [group, head_dim] over the last page and the others with the largest bounds."""
    starts = range(0, len(keys), SIZE)
    bounds = []
    for start in list(starts)[:-1]:
        page = keys[start : start + SIZE]
        per_channel = np.maximum(queries * page.min(axis=0), queries * page.max(axis=0))
        bounds.append(per_channel.sum(axis=1).max())
    chosen = [*np.argsort(bounds)[::-1][: pages - 1], len(starts) - 1]
    places = [at for page in sorted(chosen) for at in range(page * SIZE, min((page + 1) * SIZE, len(keys)))]
    scores = queries @ keys[places].T / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    mixed: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True) @ values[places]
    return mixed


@settings(max_examples=60, deadline=None)
@given(
    bound=arrays.arrays(np.float32, st.integers(1, 20), elements=st.sampled_from([0.0, 1.0, 2.0, 3.0])),
    data=st.data(),
)
def test_the_largest_are_chosen_once_each_and_in_order(
    bound: NDArray[np.float32], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(bound)))
    found = np.full(count + 1, -1, np.int64)
    largest_places(bound, count, 5, found)
    chosen = found[:count] - 5
    assert found[count] == -1
    assert (np.diff(chosen) > 0).all()
    rest = np.delete(bound, chosen)
    assert count in (0, len(bound)) or bound[chosen].min() >= rest.max()


def test_a_query_that_is_no_number_still_reads_pages_of_its_own() -> None:
    """A broken row draws no token, but it must not read beyond the pool."""
    bounds = np.ones((BLOCKS, LAYERS, KV_HEADS, 2, HEAD_DIM), np.float32)
    queries = np.full((GROUP, HEAD_DIM), np.nan, np.float32)
    pages = np.full(4, -1, np.int64)
    assert choose_pages(LAYER, 1, queries, bounds, np.arange(BLOCKS), 0, BLOCKS - 1, pages) == 4
    assert (np.diff(pages) > 0).all()
    assert ((pages >= 0) & (pages < BLOCKS)).all()


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_bounds_hold_for_the_keys_as_they_are_stored(stored: torch.dtype) -> None:
    with KvCache(CONFIG, BLOCKS, SIZE, stored, CPU) as cache:
        rows = PagedRows(cache, CONFIG, team_of(1))
        bounds = PageBounds(rows, BLOCKS, team_of(1))
        places = Places(np.repeat([7, 2], SIZE)[:6], np.tile(np.arange(SIZE), 2)[:6])
        rows.write(LAYER, places, *_random_kv(6, seed=3), bounds.of_layer(LAYER))
        for block, filled in ((7, SIZE), (2, 2)):
            keys = _keys_of(rows, block)[:filled]
            least, greatest = bounds.bounds[block, LAYER].numpy().transpose(1, 0, 2)
            assert (least == keys.min(axis=0)).all()
            assert (greatest == keys.max(axis=0)).all()
        del rows, bounds


def test_a_block_that_starts_anew_forgets_its_former_keys() -> None:
    with KvCache(CONFIG, BLOCKS, SIZE, torch.float32, CPU) as cache:
        rows = PagedRows(cache, CONFIG, team_of(1))
        bounds = PageBounds(rows, BLOCKS, team_of(1))
        for scale in (100.0, 1.0):
            keys, values = _random_kv(2, seed=4)
            places = Places(np.array([3, 3]), np.array([0, 1]))
            rows.write(LAYER, places, keys * scale, values, bounds.of_layer(LAYER))
        assert bounds.bounds[3, LAYER].abs().max() < 10
        del rows, bounds


def test_bounds_of_landed_blocks_are_read_from_the_pool_and_follow_copies() -> None:
    """As after a hand-off: the bytes came from elsewhere, and what is beyond the tokens is no key."""
    with KvCache(CONFIG, BLOCKS, SIZE, torch.float32, CPU) as cache:
        rows = PagedRows(cache, CONFIG, team_of(1))
        bounds = PageBounds(rows, BLOCKS, team_of(1))
        cache.pool.copy_(torch.randn(cache.pool.shape, generator=torch.Generator().manual_seed(5)))
        bounds.begin_step([(BlockId(4), 3), (BlockId(6), SIZE)], [(BlockId(4), BlockId(5))])
        for block, source, tokens_held in ((4, 4, 3), (5, 4, 3), (6, 6, SIZE)):
            keys = _keys_of(rows, source)[:tokens_held]
            found = bounds.bounds[block, LAYER].numpy().transpose(1, 0, 2)
            assert (found == np.stack((keys.min(axis=0), keys.max(axis=0)))).all()
        del rows, bounds


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of five layers, three of which choose pages."""
    config: Any = family_configs()["llama"]
    config.num_hidden_layers = FULL_LAYERS + 3
    folder = tmp_path_factory.mktemp("llama")
    random_model(config).save_pretrained(folder)
    return folder


def test_a_sequence_that_landed_goes_on_like_one_that_was_read_here(llama: Path) -> None:
    """And a copy-on-write of its last block, as when samples share a prompt, changes nothing."""
    sequence, table = tokens(46, seed=6), scattered(13, seed=6)
    quest = Reading(3)
    with (
        open_pages(llama, reading=quest) as here,
        open_pages(llama) as there,
        open_pages(llama, reading=quest) as moved,
    ):
        here.step(slice_of(sequence[:42], 0, table[:12], samples=0))
        there.step(slice_of(sequence[:42], 0, table[:12], samples=0))
        moved.cache.pool.copy_(there.cache.pool)
        landed = [(block, min(4, 42 - 4 * place)) for place, block in enumerate(table[:11])]
        copied = [*table[:10], table[12], table[11]]
        for at in range(42, 46):
            first = at == 42
            expected = here.step(slice_of(sequence[at : at + 1], at, table[:12]))
            found = moved.step(
                slice_of(sequence[at : at + 1], at, copied),
                copies=[(table[10], table[12])] if first else (),
                landed=landed if first else (),
            )
            assert torch.equal(found, expected)


def test_few_pages_change_the_logits_but_not_those_of_the_prompt(llama: Path) -> None:
    sequence, table = tokens(61, seed=7), scattered(16, seed=7)
    found = {}
    for pages in (None, 2):
        with open_pages(llama, reading=Reading(pages)) as engine:
            prompt = engine.step(slice_of(sequence[:60], 0, table))
            found[pages] = prompt, engine.step(slice_of(sequence[60:], 60, table))
    assert torch.equal(found[None][0], found[2][0])
    assert (found[None][1] - found[2][1]).abs().max() > 1e-3
