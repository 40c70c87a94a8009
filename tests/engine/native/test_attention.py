"""Native attention over blocks gives float64's, for any block tables, windows and mixture of spans."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention import Span
from engine.cpu.attention import CpuAttention
from engine.drafting.draft import Draft
from engine.kv.kv_cache import KvCache
from engine.native.attention import MOST_TOKENS
from engine.native.team import team_of_torch
from tandem.ids import BlockId
from tests.engine.native.shapes import shape

CPU = torch.device("cpu")
POOL_BLOCKS = 96

torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """A batch over a pool of random K and V."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    window: int | None
    threads: int
    dtype: torch.dtype
    lengths: tuple[tuple[int, int], ...]
    """Of each sequence: tokens in the cache, tokens of the span."""
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    spans = st.tuples(st.integers(0, 60), st.sampled_from([1, 1, 1, 2, 5, MOST_TOKENS, 20, 70]))
    return Case(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 12, 16, 64, 128])),
        block_size=draw(st.sampled_from([1, 4, 5, 16])),
        window=draw(st.sampled_from([None, None, 1, 3, 17])),
        threads=draw(st.sampled_from([1, 2, 3])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        lengths=tuple(draw(st.lists(spans, min_size=1, max_size=5))),
        seed=draw(st.integers(0, 99)),
    )


def parts(rows: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V of rows [tokens, heads + 2 kv_heads, head_dim], as views."""
    return rows[:, :heads], rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]


def expected(case: Case, pool: Tensor, span: Span, queries: Tensor) -> Tensor:
    """One span's rows in float64, from K and V as they lie in the pool after the call."""
    end = span.start + span.tokens
    keys, values = (
        pool[list(span.block_table), 0, which].flatten(0, 1)[:end].double().transpose(0, 1)
        for which in (0, 1)
    )
    query_at, key_at = torch.arange(span.start, end)[:, None], torch.arange(end)
    seen = key_at <= query_at
    if case.window is not None:
        seen &= key_at > query_at - case.window
    attended = F.scaled_dot_product_attention(
        queries[span.first_row : span.first_row + span.tokens].double().transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=seen,
        enable_gqa=True,
    )
    return attended.squeeze(0).transpose(0, 1).reshape(span.tokens, -1)


def batch(case: Case) -> tuple[list[Span], Tensor]:
    """Spans over scattered blocks of a pool, and the rows of Q, K and V together."""
    generator = torch.Generator().manual_seed(case.seed)
    free = torch.randperm(POOL_BLOCKS * 16 // case.block_size, generator=generator).tolist()
    spans: list[Span] = []
    row = 0
    for start, count in case.lengths:
        blocks = -(-(start + count) // case.block_size)
        table, free = [BlockId(block) for block in free[:blocks]], free[blocks:]
        spans.append(Span(row, count, start, table))
        row += count
    rows = torch.randn(row, case.heads + 2 * case.kv_heads, case.head_dim, generator=generator)
    return spans, rows.to(case.dtype)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_every_span_attends_as_in_float64(case: Case) -> None:
    config = shape(case.heads, case.kv_heads, case.head_dim, (case.window,))
    spans, rows = batch(case)
    with KvCache(config, POOL_BLOCKS * 16 // case.block_size, case.block_size, case.dtype, CPU) as cache:
        cache.pool.normal_(generator=torch.Generator().manual_seed(case.seed))
        attention = CpuAttention(cache, config, team_of_torch(case.threads))
        queries, keys, values = parts(rows, case.heads, case.kv_heads)
        with torch.inference_mode():
            found = attention.prepare(spans)(0, queries, keys, values)
        for span in spans:
            mine = slice(span.first_row, span.first_row + span.tokens)
            difference = found[mine].double() - expected(case, cache.pool, span, queries)
            # bfloat16 has 8 bits, and torch rounds long spans' probabilities to it as well.
            assert difference.abs().max() < (1e-5 if case.dtype == torch.float32 else 5e-2)
            stored = cache.pool[list(span.block_table), 0].transpose(0, 1).flatten(1, 2)
            at = slice(span.start, span.start + span.tokens)
            assert torch.equal(stored[0, at], keys[mine])
            assert torch.equal(stored[1, at], values[mine])
        del attention


def attended_first(lengths: tuple[int, ...], threads: int) -> Tensor:
    """The first sequence's row in a batch of one token each; its K and V do not depend on the others."""
    config = shape(6, 3, 64, (None,))
    with KvCache(config, 64, 4, torch.float32, CPU) as cache:
        cache.pool.normal_(generator=torch.Generator().manual_seed(0))
        attention = CpuAttention(cache, config, team_of_torch(threads))
        generator = torch.Generator().manual_seed(1)
        rows = torch.cat([torch.randn(1, 12, 64, generator=generator) for _ in lengths])
        table = [BlockId(block) for block in range(16)]
        spans = [
            Span(row, 1, start, [BlockId(16 * row + block) for block in table])
            for row, start in enumerate(lengths)
        ]
        with torch.inference_mode():
            found = attention.prepare(spans)(0, *parts(rows, 6, 3))[0].clone()
        del attention
        return found


def test_what_a_sequence_gets_does_not_depend_on_its_batch_or_on_threads() -> None:
    alone = attended_first((40,), threads=1)
    assert torch.equal(alone, attended_first((40,), threads=2))
    assert torch.equal(alone, attended_first((40, 3, 60, 17), threads=2))


def test_a_tree_of_guesses_is_left_to_torch() -> None:
    config = shape(2, 1, 8, (None,))
    tree = Draft((5, 6, 7), (-1, 0, 0))
    with KvCache(config, 8, 4, torch.float32, CPU) as cache:
        rows = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
        span = Span(0, 4, 6, [BlockId(3), BlockId(1), BlockId(2)], tree)
        found = []
        for team in (team_of_torch(2), None):
            cache.pool.normal_(generator=torch.Generator().manual_seed(0))
            attention = CpuAttention(cache, config, team)
            with torch.inference_mode():
                found.append(attention.prepare([span])(0, *parts(rows, 2, 1)).clone())
            del attention
        assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("table", [[0], [0, 8], [0, -1]])
def test_a_block_table_that_is_short_or_leaves_the_pool_is_refused(table: list[int]) -> None:
    config = shape(2, 1, 8, (None,))
    with KvCache(config, 8, 4, torch.float32, CPU) as cache:
        attention = CpuAttention(cache, config, team_of_torch(1))
        with pytest.raises(IndexError):
            attention.prepare([Span(0, 1, 5, [BlockId(block) for block in table])])
        del attention
