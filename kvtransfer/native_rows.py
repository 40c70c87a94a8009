"""Edge: rows of bytes copied and hashed by native loops: one call for many rows, without the GIL.

A memmove or a hash for each row costs a Python call and a hand-over of the GIL apiece, as much as a row of
24 KiB takes. Rows are given by their addresses, int64 [rows]; who calls has checked that they lie where they
should. Compiled by numba when the module is imported, and kept on disk where that can be written.

The checksum is XXH3-64 (xxhash's specification, version 0.8), whose accumulators are one vector of eight
words: a line is loaded once, and what was loaded is both mixed into them and stored. So a sum is that of the
bytes that were written, whatever happens to the row that they were read from.
"""

import ctypes
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kvtransfer.checksums import block_checksum

STREAM_BYTES: Final = 4 * 1024 * 1024
"""From so many bytes on what is written bypasses the caches, which it does not fit; nothing is read first."""

LINE_BYTES: Final = 64
"""What one store writes past the caches; also the alignment that it wants, and XXH3's stripe."""

SPAN_BYTES: Final = 16 * LINE_BYTES
"""Stripes between two scrambles of XXH3's accumulators."""

TAIL_BYTES: Final = 15 * LINE_BYTES
"""What is left before the last line of a row that spans divide, which KV mostly is."""

SHORT_BYTES: Final = 240
"""Up to so many bytes XXH3 is another function, which is left to its library."""

AHEAD_BYTES: Final = 8192
"""How far before it is read a line is asked for, across the ends of rows."""

Addresses = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint64]

_BYTE: Final = ir.IntType(8)
_WORD: Final = ir.IntType(64)
_LINE: Final = ir.VectorType(_WORD, LINE_BYTES // 8)

_SECRET: Final = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
        "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
        "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
        "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
        "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    dtype=np.uint8,
)
"""XXH3's default secret: stripe n of a span is mixed with eight words from byte 8 n on."""

_SCRAMBLE_AT: Final = 128
_LAST_AT: Final = 121
_MERGE_AT: Final = 11
"""Bytes of the secret for a scramble, the last stripe, and the digest."""

_PRIME_32: Final = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME_64: Final = (
    *(0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9),
    *(0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5),
)
_BEGIN: Final = (_PRIME_32[2], *_PRIME_64[:4], _PRIME_32[1], _PRIME_64[4], _PRIME_32[0])
_AVALANCHE: Final = 0x165667919E3779F9


class _Store(Enum):
    """Where lines that were read go."""

    NOWHERE = "nowhere"
    CACHED = "cached"
    STREAMED = "streamed"
    """To an address that LINE_BYTES divide, by a store that bypasses the caches."""


def _pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


def _loaded(builder: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    """What lies at an address, which may be any."""
    value = builder.load(_pointer(builder, builder.add(address, _WORD(offset)), kind))
    value.align = 1
    return value


def _stored(builder: ir.IRBuilder, line: ir.Value, address: ir.Value, store: _Store) -> None:
    made = builder.store(line, _pointer(builder, address, _LINE))
    made.align = LINE_BYTES if store is _Store.STREAMED else 1
    if store is _Store.STREAMED:
        made.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))


def _fetched(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Asks for the line at an address, which may be any, so that it is in the cache soon."""
    pointer, number = _BYTE.as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    # To read, into the nearest cache, as data.
    builder.call(fetch, [_pointer(builder, address, _BYTE), number(0), number(3), number(1)])


def _everywhere(word: int) -> ir.Constant:
    return ir.Constant(_LINE, [word] * (LINE_BYTES // 8))


def _mixed(builder: ir.IRBuilder, sums: ir.Value, line: ir.Value, key: ir.Value) -> ir.Value:
    """XXH3's accumulate: the halves of each word, keyed, are multiplied; its neighbour takes it as it is."""
    keyed = builder.xor(line, key)
    low = builder.and_(keyed, _everywhere(0xFFFFFFFF))
    product = builder.mul(low, builder.lshr(keyed, _everywhere(32)))
    order = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])
    swapped = builder.shuffle_vector(line, line, order)
    return builder.add(builder.add(sums, swapped), product)


def _scrambled(builder: ir.IRBuilder, sums: ir.Value, key: ir.Value) -> ir.Value:
    shifted = builder.xor(sums, builder.lshr(sums, _everywhere(47)))
    return builder.mul(builder.xor(shifted, key), _everywhere(_PRIME_32[0]))


def _passing(lines: int, store: _Store, hashes: bool) -> Any:
    """An intrinsic of (sums, secret, read, write, ahead): lines are read, mixed into `sums` and stored.

    All are addresses. As many lines are asked for from `ahead` on. A whole span ends with a scramble.
    """

    def declared(_typing: Any, _sums: Any, _secret: Any, _read: Any, _write: Any, _ahead: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
            sums_at, secret, read, write, ahead = values
            sums = _loaded(builder, sums_at, 0, _LINE) if hashes else None
            for number in range(lines):
                offset = _WORD(number * LINE_BYTES)
                _fetched(builder, builder.add(ahead, offset))
                line = _loaded(builder, read, number * LINE_BYTES, _LINE)
                if store is not _Store.NOWHERE:
                    _stored(builder, line, builder.add(write, offset), store)
                if sums is not None:
                    sums = _mixed(builder, sums, line, _loaded(builder, secret, 8 * number, _LINE))
            if sums is not None and lines * LINE_BYTES == SPAN_BYTES:
                sums = _scrambled(builder, sums, _loaded(builder, secret, _SCRAMBLE_AT, _LINE))
            if sums is not None:
                _stored(builder, sums, sums_at, _Store.CACHED)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return intrinsic(declared)


def _beginning(_typing: Any, _sums: Any) -> Any:
    """Sets the accumulators at an address."""

    def generate(context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        _stored(builder, ir.Constant(_LINE, list(_BEGIN)), values[0], _Store.CACHED)
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _ending(_typing: Any, _sums: Any, _secret: Any, _length: Any) -> Any:
    """XXH3-64 from the accumulators of (address of them, address of the secret, bytes that were mixed)."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        sums, secret, length = values
        wide = ir.IntType(128)
        digest = builder.mul(length, _WORD(_PRIME_64[0]))
        for offset in range(0, LINE_BYTES, 16):
            pair = [
                builder.xor(
                    _loaded(builder, sums, offset + word, _WORD),
                    _loaded(builder, secret, _MERGE_AT + offset + word, _WORD),
                )
                for word in (0, 8)
            ]
            product = builder.mul(*[builder.zext(word, wide) for word in pair])
            high = builder.trunc(builder.lshr(product, wide(64)), _WORD)
            digest = builder.add(digest, builder.xor(builder.trunc(product, _WORD), high))
        digest = builder.xor(digest, builder.lshr(digest, _WORD(37)))
        digest = builder.mul(digest, _WORD(_AVALANCHE))
        return builder.xor(digest, builder.lshr(digest, _WORD(32)))

    return types.uint64(types.int64, types.int64, types.int64), generate


def _copying(_typing: Any, _target: Any, _source: Any, _length: Any) -> Any:
    """memcpy of `length` bytes."""

    def generate(context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        pointer = _BYTE.as_pointer()
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, _WORD])
        target, source = (_pointer(builder, address, _BYTE) for address in values[:2])
        builder.call(memcpy, [target, source, values[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _settling(_typing: Any) -> Any:
    """Orders what was stored past the caches before whatever is stored next."""

    def generate(context: Any, builder: Any, _signature: Any, _values: Sequence[Any]) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


_copy: Final[Any] = intrinsic(_copying)
_settle: Final[Any] = intrinsic(_settling)
_begin: Final[Any] = intrinsic(_beginning)
_end: Final[Any] = intrinsic(_ending)
_stream_lines: Final[Any] = _passing(4, _Store.STREAMED, hashes=False)
_hash_span: Final[Any] = _passing(16, _Store.NOWHERE, hashes=True)
_copy_hash_span: Final[Any] = _passing(16, _Store.CACHED, hashes=True)
_stream_hash_span: Final[Any] = _passing(16, _Store.STREAMED, hashes=True)
_stream_hash_tail: Final[Any] = _passing(15, _Store.STREAMED, hashes=True)
_hash_line: Final[Any] = _passing(1, _Store.NOWHERE, hashes=True)
_copy_hash_line: Final[Any] = _passing(1, _Store.CACHED, hashes=True)
_stream_hash_line: Final[Any] = _passing(1, _Store.STREAMED, hashes=True)


def _compiled(signature: str, function: Callable[..., None]) -> Callable[..., None]:
    try:
        made: Callable[..., None] = njit(signature, nogil=True, cache=True)(function)
    except RuntimeError:
        # No place on disk may be written; it is compiled in every process then.
        made = njit(signature, nogil=True)(function)
    return made


def _copy_loop(reads: Addresses, writes: Addresses, length: int) -> None:
    for row in range(reads.shape[0]):
        _copy(writes[row], reads[row], length)


def _stream_loop(reads: Addresses, writes: Addresses, length: int) -> None:
    last = reads.shape[0] - 1
    for row in range(reads.shape[0]):
        read, write, following = reads[row], writes[row], reads[min(row + 1, last)] - length
        for at in range(0, length, 4 * LINE_BYTES):
            ahead = at + AHEAD_BYTES
            # The processor looks ahead within a page only; rows of 24 KiB take a third longer otherwise.
            wanted = ahead + (read if ahead < length else following)
            _stream_lines(0, 0, read + at, write + at, wanted)
    _settle()


def _hash_loop(reads: Addresses, length: int, secret: int, mixed: int, sums: Sums) -> None:
    last = reads.shape[0] - 1
    whole = (length - 1) // SPAN_BYTES * SPAN_BYTES
    lines = (length - 1) // LINE_BYTES * LINE_BYTES
    for row in range(reads.shape[0]):
        read, following = reads[row], reads[min(row + 1, last)] - length
        _begin(mixed)
        for at in range(0, whole, SPAN_BYTES):
            ahead = at + AHEAD_BYTES
            _hash_span(mixed, secret, read + at, 0, ahead + (read if ahead < length else following))
        for at in range(whole, lines, LINE_BYTES):
            _hash_line(mixed, secret + (at - whole) // 8, read + at, 0, following + at + AHEAD_BYTES)
        _hash_line(mixed, secret + _LAST_AT, read + length - LINE_BYTES, 0, following + length + AHEAD_BYTES)
        sums[row] = _end(mixed, secret, length)


def _copy_hash_loop(
    reads: Addresses, writes: Addresses, length: int, secret: int, mixed: int, sums: Sums
) -> None:
    last = reads.shape[0] - 1
    whole = (length - 1) // SPAN_BYTES * SPAN_BYTES
    lines = (length - 1) // LINE_BYTES * LINE_BYTES
    for row in range(reads.shape[0]):
        read, write, following = reads[row], writes[row], reads[min(row + 1, last)] - length
        _begin(mixed)
        for at in range(0, whole, SPAN_BYTES):
            ahead = at + AHEAD_BYTES
            wanted = ahead + (read if ahead < length else following)
            _copy_hash_span(mixed, secret, read + at, write + at, wanted)
        for at in range(whole, lines, LINE_BYTES):
            key, wanted = secret + (at - whole) // 8, following + at + AHEAD_BYTES
            _copy_hash_line(mixed, key, read + at, write + at, wanted)
        # The last line overlaps the one before unless lines divide the row; it is hashed as it lies.
        _copy(write + lines, read + lines, length - lines)
        end, wanted = write + length - LINE_BYTES, following + lines + AHEAD_BYTES
        _hash_line(mixed, secret + _LAST_AT, end, 0, wanted)
        sums[row] = _end(mixed, secret, length)


def _stream_hash_loop(
    reads: Addresses, writes: Addresses, length: int, secret: int, mixed: int, sums: Sums
) -> None:
    last = reads.shape[0] - 1
    whole = (length - 1) // SPAN_BYTES * SPAN_BYTES
    lines = length - LINE_BYTES
    for row in range(reads.shape[0]):
        read, write, following = reads[row], writes[row], reads[min(row + 1, last)] - length
        _begin(mixed)
        for at in range(0, whole, SPAN_BYTES):
            ahead = at + AHEAD_BYTES
            wanted = ahead + (read if ahead < length else following)
            _stream_hash_span(mixed, secret, read + at, write + at, wanted)
        wanted = following + AHEAD_BYTES
        if lines - whole == TAIL_BYTES:
            _stream_hash_tail(mixed, secret, read + whole, write + whole, wanted + whole)
        else:
            for at in range(whole, lines, LINE_BYTES):
                key = secret + (at - whole) // 8
                _stream_hash_line(mixed, key, read + at, write + at, wanted + at)
        _stream_hash_line(mixed, secret + _LAST_AT, read + lines, write + lines, wanted + lines)
        sums[row] = _end(mixed, secret, length)
    _settle()


_copy_rows: Final = _compiled("void(i8[::1], i8[::1], i8)", _copy_loop)
_stream_rows: Final = _compiled("void(i8[::1], i8[::1], i8)", _stream_loop)
_hash_rows: Final = _compiled("void(i8[::1], i8, i8, i8, u8[::1])", _hash_loop)
_copy_hash_rows: Final = _compiled("void(i8[::1], i8[::1], i8, i8, i8, u8[::1])", _copy_hash_loop)
_stream_hash_rows: Final = _compiled("void(i8[::1], i8[::1], i8, i8, i8, u8[::1])", _stream_hash_loop)


def copy_rows(reads: Addresses, writes: Addresses, length: int) -> None:
    """Copies `length` bytes from each address to the one at its place."""
    if _streams(writes, length):
        _stream_rows(reads, writes, length)
    else:
        _copy_rows(reads, writes, length)


def hash_rows(reads: Addresses, length: int) -> Sums:
    """XXH3-64 of the `length` bytes at each address, uint64 [rows]."""
    if length <= SHORT_BYTES:
        return np.array([_digest(int(address), length) for address in reads], dtype=np.uint64)
    sums, mixed = np.empty(len(reads), dtype=np.uint64), np.empty(LINE_BYTES, dtype=np.uint8)
    _hash_rows(reads, length, _SECRET.ctypes.data, mixed.ctypes.data, sums)
    return sums


def copy_and_hash_rows(reads: Addresses, writes: Addresses, length: int) -> Sums:
    """Copies as `copy_rows`, and gives the XXH3-64 of the bytes that it wrote, uint64 [rows]."""
    if length <= SHORT_BYTES:
        _copy_rows(reads, writes, length)
        return hash_rows(writes, length)
    sums, mixed = np.empty(len(reads), dtype=np.uint64), np.empty(LINE_BYTES, dtype=np.uint8)
    rows = _stream_hash_rows if _streams(writes, length) else _copy_hash_rows
    rows(reads, writes, length, _SECRET.ctypes.data, mixed.ctypes.data, sums)
    return sums


def _streams(writes: Addresses, length: int) -> bool:
    if len(writes) * length < STREAM_BYTES or length % (4 * LINE_BYTES):
        return False
    return not np.bitwise_or.reduce(writes) % LINE_BYTES


def _digest(address: int, length: int) -> int:
    return block_checksum(memoryview((ctypes.c_ubyte * length).from_address(address)))
