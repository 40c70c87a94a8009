"""Pure: how many KV blocks fit a device once the model is loaded and a dry run has shown its peak."""

from dataclasses import dataclass

from tandem.errors import ConfigError

GRAPH_BYTES = 512 * 1024**2
"""Kept back for captured graphs and the allocator's fragments."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one device: all, those free with the weights loaded, and the dry run's peak above them."""

    total: int
    free_with_weights: int
    activation_peak: int


def kv_blocks(memory: DeviceMemory, block_bytes: int, share: float, least_blocks: int) -> int:
    """Blocks of the pool when the process may use `share` of the device's memory.

    One more block than the answer must be allocated: graphs write their padding there. Raises ConfigError,
    with the bytes that are missing, when not even `least_blocks` fit.
    """
    used = memory.total - memory.free_with_weights
    room = int(memory.total * share) - used - memory.activation_peak - GRAPH_BYTES
    blocks = room // block_bytes - 1
    if blocks < least_blocks:
        missing = (least_blocks + 1) * block_bytes - room
        raise ConfigError(
            f"The device has no room for {least_blocks} KV blocks of {block_bytes} bytes beside the model: "
            f"{missing} bytes are missing. Use a smaller context, token budget or model, or more GPUs."
        )
    return blocks


def graph_buckets(max_batch: int) -> tuple[int, ...]:
    """Batch sizes to capture: 1, 2, 4, 8, in eights up to 64, in 32s beyond, and max_batch."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, max(97, max_batch + 1), 32)]
    return (*(size for size in sizes if size < max_batch), max_batch)


def bucket_for(batch: int, buckets: tuple[int, ...]) -> int | None:
    """The smallest bucket that holds the batch; None when none does."""
    return next((bucket for bucket in buckets if bucket >= batch), None)
