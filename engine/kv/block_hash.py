"""Pure: chain hashes, by which workers and router name the same prefix without sending its tokens."""

import struct
from collections.abc import Sequence

import xxhash

from tandem.ids import BlockHash

ROOT_HASH = BlockHash(bytes(16))
"""Parent of every first block."""


def extend_hash(parent: BlockHash, block_tokens: Sequence[int]) -> BlockHash:
    """Hash of the prefix that ends with these tokens: XXH3-128 of parent and tokens as little-endian uint32.

    `block_tokens` is exactly one block. A token id outside 0 .. 2**32-1 raises struct.error.
    """
    packed = struct.pack(f"<{len(block_tokens)}I", *block_tokens)
    return BlockHash(xxhash.xxh3_128_digest(parent + packed))


def chain_hashes(token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """One hash for each full block of `token_ids`, first block first; a rest that fills no block has none."""
    hashes: list[BlockHash] = []
    parent = ROOT_HASH
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = extend_hash(parent, token_ids[start : start + block_size])
        hashes.append(parent)
    return hashes
