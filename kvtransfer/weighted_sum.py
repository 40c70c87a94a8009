"""Pure: wsum64, a checksum of KV blocks that a GPU computes as fast as it reads.

Over the block's little-endian 32-bit words w_0 .. w_(n-1), all arithmetic modulo 2^64:

    wsum64 = n * LENGTH_FACTOR + sum of w_i * weight(i)
    weight(i) = mix(i + 1) | 1

Weights are odd, so no change of a single word goes unseen, and they look random, so that words in each
other's places and changes of several words do, too, but for one in about 2^63 (weights differ in 63 bits).
The sum's terms may be added in any order. It catches what moves wrongly, not what somebody forges.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tandem.errors import TransferError, TransferFault

NAME: Final = "wsum64"
WORD_BYTES: Final = 4
LENGTH_FACTOR: Final = 0xA24BAED4963EE407
MIX_FIRST: Final = 0x9E3779B97F4A7C15
MIX_SECOND: Final = 0xD6E8FEB86659FD93

_CHUNK_WORDS: Final = 1 << 16
_MASK: Final = (1 << 64) - 1


def weights(first: int, count: int) -> NDArray[np.uint64]:
    """weight(first) .. weight(first + count - 1), uint64 [count]."""
    mixed = (np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(MIX_FIRST)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(MIX_SECOND)
    mixed ^= mixed >> np.uint64(32)
    return mixed | np.uint64(1)


def weighted_sum(data: memoryview) -> int:
    """wsum64 of bytes in host memory. Raises TransferError (UNSUPPORTED) unless they are whole words."""
    if len(data) % WORD_BYTES:
        raise TransferError(TransferFault.UNSUPPORTED, f"{len(data)} bytes are not whole 32-bit words.")
    words = np.frombuffer(data, dtype="<u4")
    total = len(words) * LENGTH_FACTOR
    for first in range(0, len(words), _CHUNK_WORDS):
        part = words[first : first + _CHUNK_WORDS].astype(np.uint64)
        total += int((part * weights(first, len(part))).sum(dtype=np.uint64))
    return total & _MASK
