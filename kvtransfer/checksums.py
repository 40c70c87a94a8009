"""Pure: checksums of KV blocks, which catch what moves wrongly (not what somebody forges).

A block's checksum is XXH3-64 (or, where a device computes it, wsum64 of weighted_sum.py) of the bytes that
moved of it; a piece's is XXH3-64 of its blocks' in order.
Source and sink each compute theirs from their own memory, and the source compares them at the commit.
"""

import struct
from collections.abc import Sequence
from typing import Final

import xxhash

XXH3: Final = "xxh3_64"
"""Name of this checksum, as a pair agrees on it when it connects."""


def block_checksum(part: memoryview) -> int:
    """XXH3-64 of bytes; releases the GIL while it reads many."""
    return int(xxhash.xxh3_64_intdigest(part))


def piece_checksum(checksums: Sequence[int]) -> int:
    """One checksum for a piece, from those of its blocks in order."""
    return int(xxhash.xxh3_64_intdigest(struct.pack(f"<{len(checksums)}Q", *checksums)))
