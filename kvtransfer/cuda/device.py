"""Edge: a CUDA device as transports use it: streams and events of torch, kernels of block_kernels.py."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvtransfer import weighted_sum
from kvtransfer.device import Device, DevicePool, Lane, Mark, PieceCopy
from tandem.errors import TransferError, TransferFault


def open_device(index: int) -> Device:
    """Raises OSError, in a sentence, where there is no such device or no triton."""
    return _open(index)


def _open(index: int) -> "CudaDevice":
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise OSError(f"There is no CUDA device {index}.")
    try:
        from kvtransfer.cuda import block_kernels
    except ImportError as error:
        raise OSError(f"triton is not installed or cannot be loaded ({error}).") from error
    return CudaDevice(index, block_kernels)


@functools.cache
def _hashing_device(index: int) -> "CudaDevice":
    return _open(index)


def device_checksums(
    pool: DevicePool, blocks: Sequence[int], offset_bytes: int, size_bytes: int
) -> tuple[int, ...]:
    """CudaDevice.checksums of a pool, by one device object for all. Raises OSError as open_device does."""
    return _hashing_device(pool.device_index).checksums(pool, blocks, offset_bytes, size_bytes)


class CudaDevice:
    """See Device; errors of CUDA come as TransferErrors."""

    def __init__(self, index: int, kernels: Any) -> None:
        self._index = index
        self._kernels = kernels
        with self.current():
            # Staging comes from memory that no other stream has ever used: torch gives what was freed on a
            # stream back to it at once, though kernels that use it may still run.
            self._own = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]

    @contextmanager
    def current(self) -> Iterator[None]:
        """See Device."""
        try:
            with torch.cuda.device(self._index):
                yield
        except torch.OutOfMemoryError as error:
            raise TransferError(TransferFault.UNSUPPORTED, "The device has no memory left.") from error
        except RuntimeError as error:
            raise TransferError(TransferFault.DISCONNECTED, f"The device failed: {error}") from error

    def lane(self) -> Lane:
        """See Device."""
        return CudaLane(self._index, self._kernels)

    def staging(self, size_bytes: int) -> "CudaStaging":
        """See Device."""
        with torch.cuda.stream(self._own):
            return CudaStaging(torch.empty(size_bytes, dtype=torch.uint8, device=f"cuda:{self._index}"))

    def pinned(self, size_bytes: int) -> "CudaPinned":
        """See Device; with unified addressing the host's address is the device's, too."""
        return CudaPinned(torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True))

    def free_bytes(self) -> int:
        """See Device."""
        return int(torch.cuda.mem_get_info(self._index)[0])

    def checksums(
        self, pool: DevicePool, blocks: Sequence[int], offset_bytes: int, size_bytes: int
    ) -> tuple[int, ...]:
        """wsum64 of the same byte range of each block, in order; waits for the device.

        Raises TransferError (UNSUPPORTED) unless the range is of whole, aligned words.
        """
        pieces = pool.pieces(offset_bytes)
        if (pieces.address | pieces.stride_bytes | size_bytes) % weighted_sum.WORD_BYTES:
            raise TransferError(TransferFault.UNSUPPORTED, "The range is not of whole 32-bit words.")
        if not blocks:
            return ()
        words, count = size_bytes // weighted_sum.WORD_BYTES, self._kernels.SUM_WORDS
        programs = -(-words // count)
        with self.current(), torch.cuda.stream(self._own):
            indices = _on_device(blocks, self._index)
            sums = torch.empty((len(blocks), programs), dtype=torch.int64, device=f"cuda:{self._index}")
            self._kernels.sum_pieces[(len(blocks), programs)](
                pieces.address, pieces.stride_bytes, indices, words, sums, COUNT=count, num_warps=8
            )
            totals: list[int] = sums.sum(1).tolist()
        return tuple((total + words * weighted_sum.LENGTH_FACTOR) % 2**64 for total in totals)


class CudaStaging:
    """See Staging."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory

    @property
    def address(self) -> int:
        """See Staging."""
        return self._memory.data_ptr()


class CudaPinned:
    """See Pinned."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self.view = memory.numpy().data

    @property
    def address(self) -> int:
        """See Pinned."""
        return self._memory.data_ptr()


class CudaMark:
    """See Mark."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        """See Mark."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]


class CudaLane:
    """See Lane."""

    def __init__(self, index: int, kernels: Any) -> None:
        self._index = index
        self._kernels = kernels
        self._stream = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]

    @property
    def stream(self) -> int:
        """See Lane."""
        return int(self._stream.cuda_stream)

    def copy(self, wanted: PieceCopy) -> None:
        """See Lane; 8 bytes at a time where all is aligned so."""
        if not wanted.source_indices:
            return
        numbers = wanted.source.address | wanted.source.stride_bytes | wanted.target.address
        numbers |= wanted.target.stride_bytes | wanted.piece_bytes
        word, word_bytes = (self._kernels.BYTE, 1) if numbers % 8 else (self._kernels.LONG, 8)
        words, count = wanted.piece_bytes // word_bytes, self._kernels.COPY_WORDS
        with torch.cuda.stream(self._stream):
            self._kernels.copy_pieces[(len(wanted.source_indices), -(-words // count))](
                *(wanted.source.address, wanted.source.stride_bytes),
                _on_device(wanted.source_indices, self._index),
                *(wanted.target.address, wanted.target.stride_bytes),
                _on_device(wanted.target_indices, self._index),
                words,
                WORD=word,
                COUNT=count,
                num_warps=8,
            )

    def mark(self) -> Mark:
        """See Lane."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return CudaMark(event)

    def wait(self, mark: Mark) -> None:
        """See Lane. Raises ValueError for a mark of another device's kind."""
        if not isinstance(mark, CudaMark):
            raise ValueError("A CUDA stream waits for marks of CUDA streams only.")
        self._stream.wait_event(mark.event)


def _on_device(numbers: Sequence[int], index: int) -> torch.Tensor:
    """int64 on the device, for the current stream; pinned first, so that the copy does not wait."""
    host = torch.tensor(numbers, dtype=torch.int64).pin_memory()
    return host.to(f"cuda:{index}", non_blocking=True)
