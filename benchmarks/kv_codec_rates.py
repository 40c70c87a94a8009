"""Edge: what the wire codecs cost on this machine, for `tandem bench kv`: bytes, error, seconds.

The numbers are drawn, so that no model is needed: normal ones, of which some channels are much larger, as in
the keys of a real model. What a codec does to a model's answers is `python -m benchmarks.kv_codecs`.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from torch import Tensor

from benchmarks.kv_layouts import BLOCK_SIZE, SMOLLM2_BLOCKS
from engine.kv.kv_cache import KvCache
from kvtransfer.codecs.contract import BlockShape, Codec, report_on
from kvtransfer.codecs.registry import CODECS, codec_named
from kvtransfer.codecs.thresholds import calibrate

SAMPLE_BLOCKS: Final = 8
"""Blocks of SmolLM2 in float32: 5.9 MB, about a batch of StagedMemory."""

LARGE_CHANNELS: Final = 0.02
"""Part of the channels whose numbers are LARGER times as large."""

LARGER: Final = 8.0


@dataclass(frozen=True, slots=True)
class CodecRates:
    """One codec; `ratio` is encoded bytes over a block's. Rates are of the pool's bytes on one core, medians.

    Errors are of drawn numbers, as parts of the largest magnitude of the number's block, layer and head.
    """

    codec: str
    block_bytes: int
    encoded_bytes: int
    ratio: float
    max_error: float
    mean_error: float
    encode_gbps: float
    decode_gbps: float


def codec_rates(rounds: int) -> list[CodecRates]:
    """Every codec over the same blocks, the first round of each thrown away."""
    with KvCache(SMOLLM2_BLOCKS.model(), 1, BLOCK_SIZE, torch.float32, torch.device("cpu")) as cache:
        shape = BlockShape.of_pool(cache.pool)
    blocks = sample_blocks(shape, SAMPLE_BLOCKS, seed=1)
    with TemporaryDirectory() as folder, torch.inference_mode():
        thresholds = Path(folder) / "thresholds.json"
        calibrate(sample_blocks(shape, SAMPLE_BLOCKS, seed=2), shape).save(thresholds)
        return [_rates(codec_named(name, shape, thresholds), shape, blocks, rounds) for name in CODECS]


def sample_blocks(shape: BlockShape, count: int, seed: int) -> Tensor:
    """Drawn blocks [count, *shape.dimensions]; the same channels are large whatever the seed."""
    channels = torch.Generator().manual_seed(0)
    large = torch.rand((shape.layers, 2, 1, shape.kv_heads, shape.head_dim), generator=channels)
    scale = torch.where(large < LARGE_CHANNELS, LARGER, 1.0)
    drawn = torch.randn((count, *shape.dimensions), generator=torch.Generator().manual_seed(seed))
    return (drawn * scale).to(shape.dtype)


def _rates(codec: Codec, shape: BlockShape, blocks: Tensor, rounds: int) -> CodecRates:
    report = report_on(codec, blocks, shape)
    encoded = torch.empty((len(blocks), codec.encoded_bytes), dtype=torch.uint8)
    decoded = torch.empty_like(blocks)
    encode_s, decode_s = [], []
    for _ in range(rounds):
        began_s = time.perf_counter()
        codec.encode(blocks, encoded)
        encoded_s = time.perf_counter()
        codec.decode(encoded, decoded)
        decode_s.append(time.perf_counter() - encoded_s)
        encode_s.append(encoded_s - began_s)
    gigabytes = len(blocks) * report.block_bytes / 1e9
    return CodecRates(
        codec=codec.name,
        block_bytes=report.block_bytes,
        encoded_bytes=report.encoded_bytes,
        ratio=report.encoded_bytes / report.block_bytes,
        max_error=report.max_error,
        mean_error=report.mean_error,
        encode_gbps=gigabytes / statistics.median(encode_s),
        decode_gbps=gigabytes / statistics.median(decode_s),
    )
