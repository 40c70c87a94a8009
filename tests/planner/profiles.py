"""Pure: a profile of a machine that follows a simple law, as `tandem profile` would write it."""

from typing import Any

from planner.step_times.profile_file import Profile, read_profile

PROMPT_TOKENS = (16, 64, 128, 256, 512)
CONTEXTS = (16, 128, 512, 1024)
BATCHES = (1, 4, 16, 32)


def prompt_s(parts: list[tuple[int, int]]) -> float:
    """2 ms, 0.5 ms a token, 0.2 us for each pair of a token and one before it."""
    tokens = sum(length for length, _ in parts)
    pairs = sum(length * (context + length / 2) for length, context in parts)
    return 2e-3 + 5e-4 * tokens + 2e-7 * pairs


def decode_s(batch: int, context_tokens: int) -> float:
    """15 ms, 0.4 ms a sequence, 2 us for each token read."""
    return 15e-3 + 4e-4 * batch + 2e-6 * context_tokens


def profile_document() -> dict[str, Any]:
    """The JSON, points on the law above."""
    prompts = [[(tokens, 0)] for tokens in PROMPT_TOKENS]
    prompts += [[(128, 256)], [(256, 512)], [(128, 0), (128, 0)], [(64, 0)] * 4]
    points: list[dict[str, Any]] = [
        {"prompts": [list(part) for part in parts], "seconds": prompt_s(parts), "runs": 5}
        for parts in prompts
    ]
    points += [
        {
            "decode_batch": batch,
            "decode_context_tokens": batch * context,
            "seconds": decode_s(batch, batch * context),
            "runs": 5,
        }
        for batch in BATCHES
        for context in CONTEXTS
    ]
    return {
        "version": 1,
        "kind": "tandem profile",
        "machine": "a law, not a machine",
        "points": points,
        "transfers": [{"transport": "shm", "bytes": 1 << 20, "seconds": 1e-3}],
        "step_overhead_s": 0.0,
        "block_size": 16,
        "kv_bytes_per_token": 46080,
    }


def profile() -> Profile:
    """The same, read."""
    return read_profile(profile_document(), "test")
