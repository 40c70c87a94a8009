"""Edge: encoded blocks in a pool of their own, which every transport moves as it moves any pool.

Encoded block i belongs to block i of the KV pool, so whoever may touch the one may touch the other: there is
no second account of slots, and none to leak. Pages of it are taken when they are first written.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

import torch
from torch import Tensor

from kvtransfer.codecs.contract import BlockShape, Codec
from kvtransfer.codecs.registry import codec_named
from kvtransfer.contract import BlockMemory
from tandem.errors import ConfigError, TransferError, TransferFault
from tandem.ids import BlockId
from tandem.worker_config import WorkerConfig

BATCH_BYTES: Final = 8 << 20
"""About so much of the pool is encoded or decoded at a time; a stop is seen after it.

`batch_parts` are the layers of blocks that this is.
"""


class StagedMemory:
    """Encoded blocks beside a KV pool in host memory, as a BlockMemory of as many layers."""

    def __init__(self, pool: BlockMemory, shape: BlockShape, codec: Codec) -> None:
        """Raises ConfigError when the pool's blocks are not of that shape, or not in host memory."""
        if pool.block_bytes != shape.block_bytes or pool.fileno() is None:
            raise ConfigError(f"codec {codec.name} needs a pool of {shape} in host memory.")
        self.num_blocks = pool.num_blocks
        self.block_bytes = codec.encoded_bytes
        self.layer_bytes = codec.layer_bytes
        self.layers = shape.layers
        self.batch_parts = max(1, BATCH_BYTES * shape.layers // shape.block_bytes)
        self._pool = pool
        self._shape = shape
        self._codec = codec
        size = self.num_blocks * self.block_bytes
        self._descriptor = os.memfd_create("tandem-kv-encoded", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._descriptor, size)
            self._pages = mmap.mmap(self._descriptor, size)
        except OSError:
            os.close(self._descriptor)
            raise
        self._bytes = memoryview(self._pages)

    def view(self, block: BlockId) -> memoryview:
        """Writable bytes of one encoded block. Raises IndexError outside the pool."""
        if not 0 <= block < self.num_blocks:
            raise IndexError(f"block {block} is outside a pool of {self.num_blocks}")
        return self.window(block * self.block_bytes, self.block_bytes)

    def window(self, begin: int, length: int) -> memoryview:
        """Writable bytes [begin, begin + length) of all encoded blocks."""
        return self._bytes[begin : begin + length]

    def fileno(self) -> int | None:
        """Descriptor of the memfd, valid until `close`."""
        return self._descriptor

    def encode(self, blocks: Sequence[BlockId], layers: range) -> None:
        """Writes layers of the pool's blocks into their places here; for a thread, and a batch at a time.

        Reads nothing else: other layers of the blocks may be written meanwhile.
        """
        where = torch.tensor(blocks, dtype=torch.int64)
        encoded = torch.empty((len(blocks), len(layers) * self.layer_bytes), dtype=torch.uint8)
        numbers = self._blocks()[:, layers.start : layers.stop].index_select(0, where)
        self._codec.encode(numbers, encoded, layers.start)
        self._encoded(layers).index_copy_(0, where, encoded)

    def decode(self, blocks: Sequence[BlockId], layers: range, stopped: Callable[[], bool]) -> None:
        """Writes what lies here of some layers into the pool's blocks, batch by batch; for a thread.

        Raises TransferError (DISCONNECTED) when `stopped` says so between two batches.
        """
        batch_blocks = max(1, self.batch_parts // len(layers))
        dimensions = (len(layers), *self._shape.dimensions[1:])
        for first in range(0, len(blocks), batch_blocks):
            if stopped():
                raise TransferError(TransferFault.DISCONNECTED, "The decoding was stopped.")
            where = torch.tensor(blocks[first : first + batch_blocks], dtype=torch.int64)
            decoded = torch.empty((len(where), *dimensions), dtype=self._shape.dtype)
            self._codec.decode(self._encoded(layers).index_select(0, where), decoded, layers.start)
            self._blocks()[:, layers.start : layers.stop].index_copy_(0, where, decoded)

    def close(self) -> None:
        """Gives the memory back once no view of it is left; idempotent."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        try:
            self._bytes.release()
            self._pages.close()
        except BufferError:
            # Somebody still holds a view; the mapping goes with the last of them.
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _blocks(self) -> Tensor:
        """The pool as [num_blocks, *shape.dimensions]; not kept, so that the pool can be closed."""
        whole = self._pool.window(0, self.num_blocks * self._shape.block_bytes)
        return torch.frombuffer(whole, dtype=self._shape.dtype).view(-1, *self._shape.dimensions)

    def _encoded(self, layers: range) -> Tensor:
        """Some layers of all encoded blocks as uint8 [num_blocks, len(layers) * layer_bytes], a view."""
        whole = torch.frombuffer(self._bytes, dtype=torch.uint8).view(self.num_blocks, self.block_bytes)
        return whole[:, layers.start * self.layer_bytes : layers.stop * self.layer_bytes]


def open_staging(config: WorkerConfig, memory: BlockMemory, pool: Tensor) -> StagedMemory | None:
    """What the worker's wire codec needs; None for identity, which moves the pool itself.

    `pool` is the tensor of `memory`. Raises ConfigError when the codec cannot be had for it.
    """
    if config.codec == "identity":
        return None
    shape = BlockShape.of_pool(pool)
    return StagedMemory(memory, shape, codec_named(config.codec, shape, config.codec_thresholds))
