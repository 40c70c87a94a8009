"""Edge: what loading a model asks of a GPU: its memory, a measured peak, and graphs."""

import re
from collections.abc import Callable
from typing import Protocol

import torch

from engine.cuda.graphs import Capture, CudaCapture
from tandem.errors import ConfigError

_NAME = re.compile(r"cuda(?::(\d+))?")


class Accelerator(Protocol):
    """One device."""

    @property
    def device(self) -> torch.device:
        """With its index."""
        ...

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA's compute capability."""
        ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; memory that this process holds without need counts as free."""
        ...

    def peak_of(self, work: Callable[[], object]) -> int:
        """The most bytes that `work` held at a time beyond what is held now."""
        ...

    def capture(self) -> Capture:
        """What makes graphs."""
        ...


class CudaAccelerator:
    """A CUDA device, through torch."""

    def __init__(self, name: str) -> None:
        """`name` is cuda or cuda:N. Raises ConfigError when there is no such device."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise ConfigError(f"device {name!r} is not supported; supported: cpu, cuda, cuda:N.")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(found[1] or 0)
        if index >= count:
            raise ConfigError(
                f"device {name!r} is not here: torch finds {count} CUDA devices on this machine."
            )
        self._device = torch.device("cuda", index)

    @property
    def device(self) -> torch.device:
        """See Accelerator."""
        return self._device

    @property
    def capability(self) -> tuple[int, int]:
        """See Accelerator."""
        return torch.cuda.get_device_capability(self._device)

    def memory(self) -> tuple[int, int]:
        """See Accelerator."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)

    def peak_of(self, work: Callable[[], object]) -> int:
        """See Accelerator."""
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

    def capture(self) -> Capture:
        """See Accelerator."""
        return CudaCapture()
