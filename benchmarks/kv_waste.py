"""Edge: how much of the KV that running conversations hold is empty, counted in the pool at every step."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.engine_drive import EngineDrive
from benchmarks.sharegpt_lengths import SHAREGPT

_SEED = 4
_POOL_SHARE = 0.9
"""Of the pool: what conversations are let into; a worker would pre-empt beyond it."""


@dataclass(frozen=True, slots=True)
class Held:
    """A conversation as a decode worker finds it at some moment."""

    context_tokens: int
    """Prompt and output so far."""
    left_tokens: int
    """Output still to come, at least one token."""


@dataclass(frozen=True, slots=True)
class KvWaste:
    """What was counted."""

    share: float
    """Of the allocated token places: those without a token, mean over the steps."""
    conversations: int
    steps: int
    mean_context_tokens: float


def held_conversations(count: int, context_tokens: int) -> list[Held]:
    """Conversations of ShareGPT's lengths that a decode worker holds at a random moment; the same each time.

    A conversation is met as often as it has steps, and at any of them; contexts are cut at `context_tokens`.
    """
    drawing = random.Random(_SEED)
    moments = [(prompt, done, output) for prompt, output in SHAREGPT for done in range(1, output)]
    return [
        Held(min(prompt + done, context_tokens), output - done)
        for prompt, done, output in drawing.choices(moments, k=count)
    ]


def measure_kv_waste(drive: EngineDrive, block_size: int, conversations: int, steps: int) -> KvWaste:
    """Decodes conversations together for at most so many steps, as many of them as the pool has room for.

    What a sequence wrote is held against the blocks that the pool has given out. Raises TandemError.
    """
    room = int(_POOL_SHARE * drive.pool.num_blocks) * block_size
    context_tokens = drive.engine.context_tokens - steps - 2
    running: list[Held] = []
    for one in held_conversations(conversations, min(context_tokens, room // 2)):
        if sum(other.context_tokens + steps for other in (*running, one)) > room:
            break
        running.append(one)
    # The first of a conversation's output tokens comes with its prompt.
    outputs = [min(one.left_tokens, steps) + 1 for one in running]
    for one, output_tokens in zip(running, outputs, strict=True):
        drive.join(drive.read([drive.prompt(one.context_tokens)], output_tokens))
    shares: list[float] = []
    contexts: list[float] = []

    def account(done: int) -> None:
        written = [
            one.context_tokens + done
            for one, output in zip(running, outputs, strict=True)
            if done < output - 1
        ]
        if written:
            shares.append(1.0 - sum(written) / (drive.pool.allocated_blocks * block_size))
            contexts.append(statistics.mean(written))

    drive.decode_joined(account)
    return KvWaste(statistics.mean(shares), len(running), len(shares), statistics.mean(contexts))


def calculated_kv_waste(lengths: Sequence[tuple[int, int]], block_size: int) -> float:
    """The share over all decode steps of conversations of (prompt, output) tokens, by arithmetic.

    The last token drawn is never stored.
    """
    stored = [prompt + done for prompt, output in lengths for done in range(output)]
    allocated = sum(-(-tokens // block_size) * block_size for tokens in stored)
    return 1.0 - sum(stored) / allocated
