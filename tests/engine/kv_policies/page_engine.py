"""Edge: tiny random models over pools of pages, and a way to look at the logits that a step computes."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.decoder import Decoder
from engine.kv_cache import KvCache
from engine.kv_policies.page_attention import PageAttention
from engine.kv_policies.page_runner import PageRunner
from engine.linear import stored_linear
from engine.model_config import read_model_config
from engine.step import SequenceSlice, StepPlan
from engine.torch_runner import TorchStepRunner
from engine.weights import read_weights
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
    ) -> Tensor:
        """Logits of every sampled row, [rows, vocabulary]."""
        pairs = tuple((BlockId(source), BlockId(target)) for source, target in copies)
        written = tuple((BlockId(block), tokens) for block, tokens in landed)
        self.runner.run(StepPlan(0, slices, pairs, written))
        return self.sampler.logits


@contextmanager
def open_pages(
    folder: Path,
    stored: torch.dtype = torch.float32,
    pages: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[PageEngine]:
    """A PageEngine over a folder, on one thread, with 64 blocks; `dtype` is the weights'."""
    config = read_model_config(folder)
    decoder = Decoder(config, read_weights(folder, config, dtype, CPU), stored_linear)
    sampler = RecordingSampler()
    with KvCache(config, 64, BLOCK_SIZE, stored, CPU) as cache:
        attention = PageAttention(cache, config, pages)
        runner = TorchStepRunner(decoder, cache, attention, sampler, CPU, threads=1)
        yield PageEngine(cache, attention, PageRunner(runner, attention), sampler)


def tokens(count: int, seed: int) -> list[int]:
    """Random token ids."""
    return [random.Random(1000 * seed + place).randrange(SIZES["vocab_size"]) for place in range(count)]


def scattered(blocks: int, seed: int) -> list[int]:
    """A block table that is in no order."""
    return random.Random(seed).sample(range(64), blocks)
