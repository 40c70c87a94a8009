"""A step of few rows through all layers in one native call gives the logits of torch's operators."""

import pytest
import torch
from torch import Tensor

from engine.attention import Span
from engine.cpu.attention import CpuAttention
from engine.cpu.linear import onednn_for, packed_linear
from engine.decoder import Decoder
from engine.kv.kv_cache import KvCache
from engine.models.model_config import ModelConfig
from engine.models.random_weights import random_weights
from engine.native.product import MOST_ROWS, lies_in_tiles
from engine.native.team import Team, team_of_torch
from tandem.ids import BlockId
from tests.engine.native.shapes import shape

CPU = torch.device("cpu")
CONFIG = shape(4, 2, 16, (None, 5, None))
BLOCKS = 200

torch.set_num_threads(1)


def tiles_are_known(dtype: torch.dtype = torch.float32) -> bool:
    """Whether oneDNN keeps weights on this processor as the native product reads them."""
    weight = torch.randn(128, 64).to(dtype)
    return onednn_for(weight) is not None and lies_in_tiles(
        torch.ops.mkldnn._reorder_linear_weight(weight, 16), weight
    )


pytestmark = pytest.mark.skipif(not tiles_are_known(), reason="oneDNN keeps weights in another layout here")


def steps(
    config: ModelConfig,
    team: Team | None,
    counts: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    computed: torch.dtype | None = None,
) -> list[Tensor]:
    """Logits of two steps of one sequence for each count: so many tokens, then one more.

    Weights are of one type, and computed with in another where one is given.
    """
    drawn = random_weights(config, dtype, CPU, 3)
    weights = {name: tensor.to(computed or dtype) for name, tensor in drawn.items()}
    decoder = Decoder(config, weights, packed_linear, team)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 64, (sum(counts) + len(counts),), generator=generator)
    with KvCache(config, BLOCKS, 4, computed or dtype, CPU) as cache, torch.inference_mode():
        cache.pool.zero_()
        attention = CpuAttention(cache, config, team)
        tables = [[BlockId(index + len(counts) * at) for at in range(6)] for index in range(len(counts))]
        first, row = [], 0
        for count, table in zip(counts, tables, strict=True):
            first.append(Span(row, count, 0, table))
            row += count
        then = [Span(index, 1, span.tokens, span.block_table) for index, span in enumerate(first)]
        found = []
        for spans, ids in ((first, token_ids[:row]), (then, token_ids[row:])):
            positions = torch.tensor([at for span in spans for at in span.positions()])
            rows = torch.tensor([span.first_row + span.tokens - 1 for span in spans])
            heard: list[int] = []
            logits = decoder.forward(ids, positions, attention.prepare(spans), rows, heard.append)
            again = decoder.forward(ids, positions, attention.prepare(spans), rows)
            assert heard == [1, 2, 3]
            assert torch.equal(again, logits)
            found.append(logits)
        del attention
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("counts", [(1,), (3, 1, 16), (1,) * MOST_ROWS, (16, 16, 1), (20, 2)])
def test_logits_equal_those_of_torchs_operators(counts: tuple[int, ...], threads: int) -> None:
    team = team_of_torch(threads)
    for found, expected in zip(steps(CONFIG, team, counts), steps(CONFIG, None, counts), strict=True):
        assert expected.abs().max() > 1e-3
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.skipif(not tiles_are_known(torch.bfloat16), reason="no native products in bfloat16 here")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("counts", [(1,), (3, 1, 16), (1,) * MOST_ROWS, (20, 2)])
def test_bfloat16s_logits_are_nearer_to_float32s_than_torchs(counts: tuple[int, ...], threads: int) -> None:
    """Both have bfloat16 weights, K and V; torch rounds the residual and all between products as well."""
    team = team_of_torch(threads)
    natively = steps(CONFIG, team, counts, torch.bfloat16)
    by_torch = steps(CONFIG, None, counts, torch.bfloat16)
    exactly = steps(CONFIG, None, counts, torch.bfloat16, torch.float32)
    for found, other, expected in zip(natively, by_torch, exactly, strict=True):
        assert found.dtype == torch.float32
        error = (found - expected).square().mean().sqrt()
        assert error < 0.02 * expected.square().mean().sqrt()
        if len(counts) > 2:
            assert error < (other - expected).square().mean().sqrt()


def test_a_sequences_logits_do_not_depend_on_its_batch() -> None:
    team = team_of_torch(2)
    alone, among = (steps(CONFIG, team, counts) for counts in ((5,), (5, 1, 9)))
    # The tokens of the second step differ, as they follow those of the others.
    assert torch.equal(alone[0][0], among[0][0])


def test_a_step_of_few_rows_is_two_calls() -> None:
    team = team_of_torch(1)
    assert team is not None
    decoder = Decoder(CONFIG, random_weights(CONFIG, torch.float32, CPU, 3), packed_linear, team)
    with KvCache(CONFIG, 4, 4, torch.float32, CPU) as cache, torch.inference_mode(), team.timed() as launched:
        cache.pool.zero_()
        attention = CpuAttention(cache, CONFIG, team)
        batch = attention.prepare([Span(0, 1, 0, [BlockId(0)])])
        decoder.forward(torch.tensor([1]), torch.tensor([0]), batch, torch.tensor([0]))
        del attention, batch
    assert launched.calls == 2
    assert launched.seconds > 0
