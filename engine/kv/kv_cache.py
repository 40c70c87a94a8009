"""Edge: the tensor that holds a worker's KV pool, in memory that other processes can map."""

import fcntl
import math
import mmap
import os
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from engine.kv_policies.quantised_rows import quantised_row
from engine.models.model_config import ModelConfig
from tandem.errors import ModelError, TransferError, TransferFault
from tandem.ids import BlockId


class PoolMemory(Protocol):
    """Host memory for a pool; others than this pool may have blocks in it."""

    @property
    def num_blocks(self) -> int:
        """What a block's number is less than."""
        ...

    @property
    def blocks(self) -> tuple[BlockId, ...]:
        """The blocks that are the pool's at its beginning."""
        ...

    @property
    def bytes(self) -> memoryview:
        """All of it, writable; block i is at i * block_bytes."""
        ...

    @property
    def descriptor(self) -> int:
        """Of a file that holds the same bytes at the same offsets, until `close`."""
        ...

    def close(self) -> None:
        """Gives it back; idempotent."""
        ...


OpenMemory = Callable[[int, int], PoolMemory | None]
"""Of (blocks of the pool, bytes of a block): memory for it; None for memory of its own."""


class KvCache:
    """K and V of every layer for a pool of blocks of `block_size` tokens; `num_blocks` is how many lie here.

    `blocks` are the pool's at its beginning, where others than it have blocks here.
    `pool` is [num_blocks, layers, 2, block_size, kv_heads, head_dim], contiguous; index 0 of the third
    dimension is K, 1 is V; a pool of torch.int8 has rows as kv_policies/quantised_rows.py says. On the CPU
    it lies in a memfd with block i at offset i * block_bytes. Satisfies kvtransfer.contract.BlockMemory.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        open_memory: OpenMemory | None = None,
    ) -> None:
        """Raises ModelError when a size is not positive or impossible, or the memory cannot be had."""
        if num_blocks < 1 or block_size < 1:
            raise ModelError(f"A KV pool needs blocks and tokens; got {num_blocks} blocks of {block_size}.")
        row = quantised_row(config.head_dim) if dtype == torch.int8 else config.head_dim
        block_shape = (config.layers, 2, block_size, config.kv_heads, row)
        self.num_blocks = num_blocks
        self.blocks: tuple[BlockId, ...] | None = None
        self.block_size = block_size
        self.block_bytes = math.prod(block_shape) * dtype.itemsize
        self.layer_bytes = self.block_bytes // config.layers
        self._shared: PoolMemory | None = None
        self._pool: Tensor | None
        shape = (num_blocks, *block_shape)
        if device.type == "cpu":
            found = None if open_memory is None else open_memory(num_blocks, self.block_bytes)
            if found is not None:
                self.num_blocks, self.blocks = found.num_blocks, found.blocks
            self._shared = found or _OwnMemory(num_blocks, self.block_bytes)
            self._pool = torch.frombuffer(self._shared.bytes, dtype=dtype).view(-1, *block_shape)
        else:
            try:
                self._pool = torch.zeros(shape, dtype=dtype, device=device)
            except torch.OutOfMemoryError as error:
                size = num_blocks * self.block_bytes
                raise ModelError(f"No memory on {device} for a KV pool of {size} bytes.") from error

    @property
    def memory(self) -> PoolMemory | None:
        """What holds the pool; None on a device, and after `close`."""
        return self._shared

    @property
    def pool(self) -> Tensor:
        """The whole pool; do not keep it beyond `close`. Raises ModelError after it."""
        if self._pool is None:
            raise ModelError("The KV cache is closed.")
        return self._pool

    def view(self, block: BlockId) -> memoryview:
        """Writable bytes of one block, length block_bytes, no copy.

        Raises TransferError (UNSUPPORTED) when the pool is not in host memory, IndexError outside the pool.
        """
        if not 0 <= block < self.num_blocks:
            raise IndexError(f"block {block} is outside a pool of {self.num_blocks}")
        return self.window(block * self.block_bytes, self.block_bytes)

    def window(self, begin: int, length: int) -> memoryview:
        """Writable bytes [begin, begin + length) of the pool, no copy; block i is at i * block_bytes.

        Raises TransferError (UNSUPPORTED) when the pool is not in host memory.
        """
        if self._shared is None:
            raise TransferError(TransferFault.UNSUPPORTED, "This KV pool has no bytes in host memory.")
        return self._shared.bytes[begin : begin + length]

    def fileno(self) -> int | None:
        """Descriptor of the memfd, valid until `close`; None when the pool is not in host memory."""
        return None if self._shared is None else self._shared.descriptor

    @property
    def device_index(self) -> int | None:
        """Which CUDA device holds the pool; None when it is in host memory."""
        return self.pool.device.index

    @property
    def device_address(self) -> int:
        """Address of block 0; block i lies i * block_bytes after it."""
        return self.pool.data_ptr()

    def copy_blocks(self, pairs: Iterable[tuple[BlockId, BlockId]]) -> None:
        """Copies source to target for each (source, target), one after the other."""
        pool = self.pool
        for source, target in pairs:
            pool[target].copy_(pool[source])

    def close(self) -> None:
        """Gives the memory back once no view of it is left; idempotent."""
        self._pool = None
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _OwnMemory:
    """A sealed memfd and its mapping: the size is fixed, so that a peer's mapping can never fault."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks = num_blocks
        size_bytes = num_blocks * block_bytes
        self.descriptor = os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Takes the pages now, in bulk: a page fault for each in the middle of a hand-off costs eight
            # times as much, and a machine without the memory says so here instead of by SIGBUS.
            os.posix_fallocate(self.descriptor, 0, size_bytes)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            # Populated, or the first step that touches a block would pay for mapping its pages.
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            self.map = mmap.mmap(self.descriptor, size_bytes, flags=flags)
        except OSError as error:
            os.close(self.descriptor)
            raise ModelError(f"No memory for a KV pool of {size_bytes} bytes: {error.strerror}.") from error
        self.bytes = memoryview(self.map)

    @property
    def blocks(self) -> tuple[BlockId, ...]:
        """All of them."""
        return tuple(BlockId(block) for block in range(self.num_blocks))

    def close(self) -> None:
        """Closes the descriptor; pages stay mapped while a view of them is held."""
        os.close(self.descriptor)
        try:
            self.bytes.release()
            self.map.close()
        except BufferError:
            # Somebody still holds a view; the mapping goes with the last of them.
            return
