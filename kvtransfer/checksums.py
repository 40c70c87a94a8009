"""Pure: XXH3-64 checksums of KV blocks, which catch what moves wrongly (not what somebody forges)."""

from collections.abc import Callable, Sequence

import xxhash

from kvtransfer.contract import BlockMemory
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId


def block_checksum(block: memoryview) -> int:
    """XXH3-64 of a block's bytes; releases the GIL while it reads a large one."""
    return int(xxhash.xxh3_64_intdigest(block))


def checksums_of(memory: BlockMemory, blocks: Sequence[BlockId]) -> tuple[int, ...]:
    """One checksum for each block, in order."""
    return tuple(block_checksum(memory.view(block)) for block in blocks)


def verify(
    memory: BlockMemory, blocks: Sequence[BlockId], expected: Sequence[int], stopped: Callable[[], bool]
) -> None:
    """Raises TransferError (CHECKSUM) at the first block that is not as granted.

    `stopped` is asked before each block; when it says so, verification ends as failed.
    """
    if len(expected) != len(blocks):
        message = f"The source gave {len(expected)} checksums for {len(blocks)} blocks."
        raise TransferError(TransferFault.CHECKSUM, message)
    for index, (block, checksum) in enumerate(zip(blocks, expected, strict=True)):
        if stopped():
            raise TransferError(TransferFault.TIMEOUT, "Verification was stopped.")
        if block_checksum(memory.view(block)) != checksum:
            raise TransferError(TransferFault.CHECKSUM, f"Block {index} did not arrive as it was sent.")
