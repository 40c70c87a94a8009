"""Edge: a wire codec between the pools of a test's pair, and what the sink must then hold."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from kvtransfer.codecs.contract import BlockShape, Codec
from kvtransfer.codecs.registry import codec_named
from kvtransfer.codecs.thresholds import calibrate
from kvtransfer.contract import BlockMemory
from kvtransfer.staging import StagedMemory

LAYERS = 4
BLOCK_SIZE = 16
HEADS = 2


@dataclass(frozen=True, slots=True)
class Coding:
    """One codec for blocks of some size."""

    shape: BlockShape
    codec: Codec

    def staged(self, pool: BlockMemory) -> StagedMemory:
        """The encoded blocks of a pool."""
        return StagedMemory(pool, self.shape, self.codec)

    def fill(self, pool: BlockMemory, seed: int) -> None:
        """Numbers as a model writes, equal for equal seeds."""
        whole = pool.window(0, pool.num_blocks * pool.block_bytes)
        drawn = torch.randn(len(whole) // 4, generator=torch.Generator().manual_seed(seed))
        whole[:] = drawn.numpy().tobytes()

    def through(self, blocks: Sequence[bytes]) -> list[bytes]:
        """What a round trip leaves of blocks."""
        before = torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.float32)
        encoded = torch.empty((len(blocks), self.codec.encoded_bytes), dtype=torch.uint8)
        after = torch.empty((len(blocks), *self.shape.dimensions))
        self.codec.encode(before.view(-1, *self.shape.dimensions), encoded)
        self.codec.decode(encoded, after)
        return [_bytes_of(block) for block in after]


@functools.cache
def coding(name: str, block_bytes: int) -> Coding:
    """A codec by name, oaken's thresholds found in random numbers; float32 blocks of LAYERS layers."""
    head_dim = block_bytes // (LAYERS * 2 * BLOCK_SIZE * HEADS * 4)
    shape = BlockShape(LAYERS, BLOCK_SIZE, HEADS, head_dim, torch.float32)
    if name != "oaken":
        return Coding(shape, codec_named(name, shape))
    with TemporaryDirectory() as folder:
        thresholds = Path(folder) / "thresholds.json"
        numbers = torch.randn((8, *shape.dimensions), generator=torch.Generator().manual_seed(1))
        calibrate(numbers, shape).save(thresholds)
        return Coding(shape, codec_named(name, shape, thresholds))


def _bytes_of(block: Tensor) -> bytes:
    return block.contiguous().numpy().tobytes()
