"""Edge: kernels over scattered blocks; the one module here that imports triton, itself imported lazily.

They take addresses as numbers, because memory of another process has no tensor in this one.
"""

from typing import Final

import triton
import triton.language as tl

from kvtransfer import weighted_sum

COPY_WORDS: Final = 4096
"""Words that one program copies."""

SUM_WORDS: Final = 8192
"""Words that one program sums up."""

BYTE: Final = tl.int8
LONG: Final = tl.int64

_FIRST: Final = tl.constexpr(weighted_sum.MIX_FIRST)
_SECOND: Final = tl.constexpr(weighted_sum.MIX_SECOND)


@triton.jit  # type: ignore[untyped-decorator]
def copy_pieces(  # type: ignore[no-untyped-def]
    source, source_stride, source_indices, target, target_stride, target_indices, words,
    WORD: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Program (i, j) copies words [j * COUNT, (j + 1) * COUNT) of the i-th piece; strides are in bytes."""
    piece = tl.program_id(0)
    places = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    offsets = places.to(tl.int64)
    valid = places < words
    begin = source + tl.load(source_indices + piece) * source_stride
    end = target + tl.load(target_indices + piece) * target_stride
    source_words = begin.to(tl.pointer_type(WORD))
    target_words = end.to(tl.pointer_type(WORD))
    tl.store(target_words + offsets, tl.load(source_words + offsets, mask=valid), mask=valid)


@triton.jit  # type: ignore[untyped-decorator]
def sum_pieces(  # type: ignore[no-untyped-def]
    source, stride, indices, words, partial_sums, COUNT: tl.constexpr
):  # fmt: skip
    """Program (i, j) writes the weighted sum of its COUNT words of the i-th piece (weighted_sum.py).

    `partial_sums` is int64 [pieces, programs of a piece]; all arithmetic wraps around at 2^64.
    """
    piece = tl.program_id(0)
    part = tl.program_id(1)
    places = part * COUNT + tl.arange(0, COUNT)
    valid = places < words
    begin = source + tl.load(indices + piece) * stride
    found = tl.load(begin.to(tl.pointer_type(tl.uint32)) + places.to(tl.int64), mask=valid, other=0)
    mixed = (places + 1).to(tl.uint64) * _FIRST
    mixed ^= mixed >> 32
    mixed *= _SECOND
    mixed ^= mixed >> 32
    total = tl.sum(found.to(tl.uint64) * (mixed | 1))
    tl.store(partial_sums + piece * tl.num_programs(1) + part, total.to(tl.int64))
