"""Pure: what transports of device memory ask of a device; cuda/device.py is one, the tests have another."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.contract import BlockMemory, DeviceBlockMemory


@dataclass(frozen=True, slots=True)
class Pieces:
    """Equal pieces in memory that the device reaches: piece i begins at `address + i * stride_bytes`."""

    address: int
    stride_bytes: int


@dataclass(frozen=True, slots=True)
class PieceCopy:
    """Copies `piece_bytes` from each source piece to the target piece at the same place of the lists."""

    source: Pieces
    source_indices: Sequence[int]
    target: Pieces
    target_indices: Sequence[int]
    piece_bytes: int


class Mark(Protocol):
    """A point in the work of a lane."""

    def done(self) -> bool:
        """Whether all work before it is done; does not wait."""
        ...


class Lane(Protocol):
    """A stream of its own; used by one thread at a time, the device being current there."""

    @property
    def stream(self) -> int:
        """The CUDA stream's handle."""
        ...

    def copy(self, wanted: PieceCopy) -> None:
        """Enqueues a copy; returns before it is done."""
        ...

    def mark(self) -> Mark:
        """A point after all that was enqueued so far."""
        ...

    def wait(self, mark: Mark) -> None:
        """Lets what is enqueued from now on begin only after a mark of this or another lane."""
        ...


class Device(Protocol):
    """One accelerator as this process uses it."""

    def current(self) -> AbstractContextManager[None]:
        """Makes it the calling thread's device."""
        ...

    def lane(self) -> Lane:
        """A new stream."""
        ...

    def staging(self, size_bytes: int) -> "Staging":
        """Memory on the device. Raises TransferError (UNSUPPORTED) when there is none left."""
        ...

    def pinned(self, size_bytes: int) -> "Pinned":
        """Host memory that the device's copies reach. Raises TransferError when there is none left."""
        ...

    def free_bytes(self) -> int:
        """Device memory that nobody holds."""
        ...


class Pinned(Protocol):
    """Page-locked host memory that is given back when the last reference to it is gone."""

    @property
    def address(self) -> int:
        """Where it begins, for the device."""
        ...

    @property
    def view(self) -> memoryview:
        """Its writable bytes."""
        ...


class Staging(Protocol):
    """Device memory that is given back when the last reference to it is gone."""

    @property
    def address(self) -> int:
        """Where it begins."""
        ...


@dataclass(frozen=True, slots=True)
class DevicePool:
    """A KV pool on a device: block i at `address + i * block_bytes`."""

    address: int
    block_bytes: int
    num_blocks: int
    device_index: int

    @classmethod
    def of(cls, memory: BlockMemory) -> "DevicePool":
        """Where a pool lies. Raises OSError when it is not on a GPU."""
        if not isinstance(memory, DeviceBlockMemory) or memory.device_index is None:
            raise OSError("The KV pool is not on a GPU.")
        return cls(memory.device_address, memory.block_bytes, memory.num_blocks, memory.device_index)

    def pieces(self, offset_bytes: int) -> Pieces:
        """The part of every block that begins at an offset."""
        return Pieces(self.address + offset_bytes, self.block_bytes)
