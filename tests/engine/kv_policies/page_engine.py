"""Edge: tiny random models over pools of pages, and a way to look at the logits that a step computes."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.cpu.linear import stored_linear
from engine.decoder import Decoder
from engine.kv.kv_cache import KvCache
from engine.kv_policies.bounded_kv import NO_DROPS, KvDrops
from engine.kv_policies.page_attention import PageAttention, Reading
from engine.kv_policies.page_runner import PageRunner
from engine.models.model_config import read_model_config
from engine.models.weights import read_weights
from engine.native.team import Team, team_of_torch
from engine.step import SequenceSlice, StepPlan
from engine.torch_runner import TorchStepRunner
from tandem.ids import BlockId
from tests.engine.tiny_models import SIZES, RecordingSampler

BLOCK_SIZE = 4
CPU = torch.device("cpu")


@dataclass
class PageEngine:
    """A runner over pages whose logits can be looked at."""

    cache: KvCache
    attention: PageAttention
    runner: PageRunner
    sampler: RecordingSampler

    def step(
        self,
        *slices: SequenceSlice,
        copies: Sequence[tuple[int, int]] = (),
        landed: Sequence[tuple[int, int]] = (),
        drops: KvDrops = NO_DROPS,
    ) -> Tensor:
        """Logits of every sampled row, [rows, vocabulary]."""
        pairs = tuple((BlockId(source), BlockId(target)) for source, target in copies)
        written = tuple((BlockId(block), tokens) for block, tokens in landed)
        self.runner.run(StepPlan(0, slices, pairs, written, drops))
        return self.sampler.logits


@contextmanager
def open_pages(
    folder: Path,
    stored: torch.dtype = torch.float32,
    reading: Reading | None = None,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
) -> Iterator[PageEngine]:
    """A PageEngine over a folder, with 64 blocks; `dtype` is the weights'."""
    config = read_model_config(folder)
    decoder = Decoder(config, read_weights(folder, config, dtype, CPU), stored_linear)
    sampler = RecordingSampler()
    with KvCache(config, 64, BLOCK_SIZE, stored, CPU) as cache:
        attention = PageAttention(cache, config, team_of(threads), reading)
        runner = TorchStepRunner(decoder, cache, attention, sampler, CPU, threads=threads)
        yield PageEngine(cache, attention, PageRunner(runner, attention), sampler)


def team_of(threads: int) -> Team:
    """Threads for native loops; a torch without them fails the test."""
    team = team_of_torch(threads)
    assert team is not None
    return team


def tokens(count: int, seed: int) -> list[int]:
    """Random token ids."""
    return [random.Random(1000 * seed + place).randrange(SIZES["vocab_size"]) for place in range(count)]


def scattered(blocks: int, seed: int) -> list[int]:
    """A block table that is in no order."""
    return random.Random(seed).sample(range(64), blocks)
