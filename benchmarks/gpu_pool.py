"""Edge: a KV pool of known bytes on a CUDA device, for checks between two processes."""

import torch

from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId


class GpuPool:
    """Blocks on device 0; satisfies BlockMemory and DeviceBlockMemory."""

    device_index: int | None = 0

    def __init__(self, num_blocks: int, block_bytes: int, seed: int) -> None:
        """Bytes are random, equal for equal seeds in every process."""
        self.num_blocks = num_blocks
        self.block_bytes = self.layer_bytes = block_bytes
        generator = torch.Generator("cuda").manual_seed(seed)
        self.tensor = torch.randint(
            0, 256, (num_blocks, block_bytes), dtype=torch.uint8, device="cuda", generator=generator
        )
        torch.cuda.synchronize()

    @property
    def device_address(self) -> int:
        """See DeviceBlockMemory."""
        return self.tensor.data_ptr()

    def view(self, block: BlockId) -> memoryview:
        """Raises TransferError: the bytes are not in host memory."""
        raise TransferError(TransferFault.UNSUPPORTED, "This KV pool has no bytes in host memory.")

    def window(self, begin: int, length: int) -> memoryview:
        """Raises TransferError: the bytes are not in host memory."""
        raise TransferError(TransferFault.UNSUPPORTED, "This KV pool has no bytes in host memory.")

    def fileno(self) -> int | None:
        """None: there is no descriptor."""
        return None
