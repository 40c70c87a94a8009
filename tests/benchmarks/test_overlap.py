"""The overlap benchmark hands real prompts over between real processes, both ways."""

from benchmarks.overlap import measure_overlap
from engine.by_hand import DEFAULT_OVERLAP_MIN_TOKENS

BLOCK_BYTES = 737_280
"""16 tokens of SmolLM2-135M in float32."""


async def test_both_ways_move_all_of_the_prompts_kv() -> None:
    tokens = DEFAULT_OVERLAP_MIN_TOKENS + 20
    figures = await measure_overlap(rounds=1, prompt_tokens=tokens, link_bytes_per_s=1e9)
    assert figures.moved_bytes == -(-tokens // 16) * BLOCK_BYTES
    assert figures.rounds == 1
    assert figures.limit_s == figures.moved_bytes / 1e9
    assert figures.ratio == figures.landed_overlapped_s / figures.landed_afterwards_s
