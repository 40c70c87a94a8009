"""Edge: a device that is the CPU, for kernels in the interpreter; its "graphs" call their work again."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.cuda.graphs import Capture


class AgainCapture:
    """A capture that does the work anew, into the same tensor, as a replay would."""

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See Capture."""
        result = work().clone()

        def replay() -> None:
            result.copy_(work())

        return replay, result


class HostAccelerator:
    """Accelerator on the CPU, with the memory that it is told to have."""

    def __init__(self, free: int, total: int, peak: int) -> None:
        self._memory = (free, total)
        self._peak = peak
        self.captures = 0

    @property
    def device(self) -> torch.device:
        """See Accelerator."""
        return torch.device("cpu")

    @property
    def capability(self) -> tuple[int, int]:
        """See Accelerator."""
        return (9, 0)

    def memory(self) -> tuple[int, int]:
        """See Accelerator."""
        return self._memory

    def peak_of(self, work: Callable[[], object]) -> int:
        """Does the work, and says what it was told."""
        work()
        return self._peak

    def capture(self) -> Capture:
        """See Accelerator."""
        self.captures += 1
        return AgainCapture()
