"""Pure: which blocks `tandem bench kv` moves, and the shape of the pools that they lie in."""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from engine.models.model_config import ModelConfig, RopeConfig
from tandem.ids import BlockId

BLOCK_SIZE: Final = 16
"""Tokens of a block, as in the default configuration."""

KIB: Final = 1024
MIB: Final = 1024 * 1024


class Placement(Enum):
    """How the blocks of a transfer lie in the pools of both sides."""

    CONTIGUOUS = "contiguous"
    SCATTERED = "scattered"


@dataclass(frozen=True, slots=True)
class Shape:
    """What makes a block's bytes: layers * 2 * BLOCK_SIZE * kv_heads * head_dim * 4."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in float32."""
        return self.layers * 2 * BLOCK_SIZE * self.kv_heads * self.head_dim * 4

    def model(self) -> ModelConfig:
        """A model with such blocks; only what the KV pool reads of it means anything."""
        return ModelConfig(
            architecture="bench",
            vocabulary_tokens=1,
            hidden_size=self.kv_heads * self.head_dim,
            intermediate_size=1,
            layers=self.layers,
            heads=self.kv_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            norm_eps=1e-5,
            rope=RopeConfig(10_000.0),
            context_tokens=BLOCK_SIZE,
            tied_embeddings=True,
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
            qk_norm=False,
            windows=(None,) * self.layers,
            eos_ids=(),
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """Blocks of one pool. `counts` are how many blocks each case moves."""

    shape: Shape
    placement: Placement
    counts: tuple[int, ...]

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pools: twice what is moved when it is scattered."""
        return max(self.counts) * (2 if self.placement is Placement.SCATTERED else 1)

    def blocks(self, count: int, step: int) -> tuple[BlockId, ...]:
        """Blocks of one side; `step` is SOURCE_STEP or SINK_STEP, so that scattered ones form no runs."""
        if self.placement is Placement.CONTIGUOUS:
            return tuple(BlockId(block) for block in range(count))
        return tuple(BlockId(index * step % self.pool_blocks) for index in range(count))


SOURCE_STEP: Final = 1013
SINK_STEP: Final = 643
"""Primes, so that `count` different blocks come out of any pool here."""

SMALL_BLOCKS: Final = Shape(layers=1, kv_heads=3, head_dim=64)
"""24 KiB: one layer of SmolLM2-135M."""

SMOLLM2_BLOCKS: Final = Shape(layers=30, kv_heads=3, head_dim=64)
"""737,280 bytes: all layers of SmolLM2-135M."""

ROUND_BLOCKS: Final = Shape(layers=1, kv_heads=8, head_dim=64)
"""64 KiB."""


ADOPTED_BLOCKS: Final = Shape(layers=16, kv_heads=8, head_dim=64)
"""1 MiB: all layers of Llama 3.2 1B."""


def adopted_counts(quick: bool) -> tuple[int, ...]:
    """How many of ADOPTED_BLOCKS change owners at one time."""
    return (1, 16) if quick else (1, 16, 64, 256)


def layouts(quick: bool) -> tuple[Layout, ...]:
    """What is moved, in order; `quick` leaves the large contiguous sizes out."""
    sizes = (64 * KIB, MIB, 16 * MIB) if quick else (64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB)
    counts = tuple(size // ROUND_BLOCKS.block_bytes for size in sizes)
    return (
        Layout(ROUND_BLOCKS, Placement.CONTIGUOUS, counts),
        Layout(SMALL_BLOCKS, Placement.SCATTERED, (1024,)),
        Layout(SMOLLM2_BLOCKS, Placement.SCATTERED, (64,)),
    )
