"""Attention in tiles gives what torch's own gives, for whole prompts, chunks and windows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cpu.linear import onednn_for
from engine.cpu.tiled_attention import attend_tiles, plan_tiles

ONEDNN = onednn_for(torch.zeros(1, 1))

pytestmark = pytest.mark.skipif(ONEDNN is None, reason="torch without oneDNN never attends in tiles")


def expected(queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    tokens, visible = queries.shape[0], keys.shape[0]
    query_at = torch.arange(visible - tokens, visible)[:, None]
    seen = torch.arange(visible) <= query_at
    if window is not None:
        seen &= torch.arange(visible) > query_at - window
    by_head = [tensor.double().transpose(0, 1).unsqueeze(0) for tensor in (queries, keys, values)]
    attended = F.scaled_dot_product_attention(
        by_head[0], by_head[1], by_head[2], attn_mask=seen, enable_gqa=True
    )
    return attended.squeeze(0).transpose(0, 1).reshape(tokens, -1)


@pytest.mark.parametrize("window", [None, 1, 7, 100, 300])
@pytest.mark.parametrize(
    ("tokens", "visible"), [(1, 1), (64, 64), (70, 70), (257, 257), (600, 600), (65, 1000), (300, 301)]
)
def test_tiles_attend_as_one_kernel_does(tokens: int, visible: int, window: int | None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(tokens + visible)
    queries = torch.randn(tokens, 6, 16)
    keys, values = torch.randn(visible, 2, 16), torch.randn(visible, 2, 16)
    with torch.inference_mode():
        found = attend_tiles(ONEDNN, plan_tiles(tokens, visible, window), queries, keys, values)
        difference = found.double() - expected(queries, keys, values, window)
    assert difference.abs().max().item() < 1e-5


def test_tiles_cover_every_query_once() -> None:
    tiles = plan_tiles(700, 900, None)
    rows = [row for tile in tiles for row in range(tile.first, tile.first + tile.queries)]
    assert rows == list(range(700))


def test_a_window_leaves_out_keys_that_no_query_of_the_tile_sees() -> None:
    first, *_, last = plan_tiles(1024, 1024, 100)
    assert first.key_begin == 0
    assert last.key_begin > 500
