"""The overlap benchmark hands real prompts over between real processes, both ways."""

import pytest

from benchmarks.overlap import measure_overlap
from engine.worker_process.by_hand import DEFAULT_OVERLAP_MIN_TOKENS

BLOCK_BYTES = 737_280
"""16 tokens of SmolLM2-135M in float32."""


CODED_BYTES = 30 * 2 * 3 * (16 * 64 + 4)
"""The same in eight bits with a scale a layer, K or V, and head."""


@pytest.mark.parametrize(("codec", "block_bytes"), [("identity", BLOCK_BYTES), ("fp8", CODED_BYTES)])
async def test_both_ways_move_all_of_the_prompts_kv(codec: str, block_bytes: int) -> None:
    tokens = DEFAULT_OVERLAP_MIN_TOKENS + 20
    figures = await measure_overlap(rounds=1, prompt_tokens=tokens, link_bytes_per_s=1e9, codec=codec)
    assert (figures.codec, figures.moved_bytes) == (codec, -(-tokens // 16) * block_bytes)
    assert figures.rounds == 1
    assert figures.limit_s == figures.moved_bytes / 1e9
    assert figures.ratio == figures.landed_overlapped_s / figures.landed_afterwards_s
