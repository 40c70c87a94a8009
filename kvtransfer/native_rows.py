"""Edge: rows of bytes copied and hashed by native loops: one call for many rows, without the GIL.

A memmove or a hash for each row costs a Python call and a hand-over of the GIL apiece, as much as a row of
24 KiB takes. Rows are given by their addresses, int64 [rows]; who calls has checked that they lie where they
should. Compiled by numba when the module is imported, and kept on disk where that can be written.
"""

import ctypes
import importlib
from collections.abc import Callable, Sequence
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
"""What one store writes past the caches; also the alignment that it wants."""

AHEAD_BYTES: Final = 8192
"""How far before it is read a line is asked for, across the ends of rows."""

PAGE_BYTES: Final = 4096
"""Where the processor stops to look ahead by itself."""

MOST_AHEAD_BYTES: Final = 32768
"""How much of a next row is asked for early."""

Addresses = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint64]

_BYTE: Final = ir.IntType(8)
_WORD: Final = ir.IntType(64)
_LINE: Final = ir.VectorType(_WORD, LINE_BYTES // 8)


def _pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(address, kind.as_pointer())


def _copying(_typing: Any, _target: Any, _source: Any, _length: Any) -> Any:
    """memcpy of `length` bytes."""

    def generate(context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        pointer = _BYTE.as_pointer()
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, _WORD])
        target, source = (_pointer(builder, address, _BYTE) for address in values[:2])
        builder.call(memcpy, [target, source, values[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _streaming(_typing: Any, _target: Any, _source: Any) -> Any:
    """Copies LINE_BYTES, to an address that they divide, by a store that bypasses the caches."""

    def generate(context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        line = builder.load(_pointer(builder, values[1], _LINE))
        line.align = 1
        store = builder.store(line, _pointer(builder, values[0], _LINE))
        store.align = LINE_BYTES
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _fetching(_typing: Any, _address: Any) -> Any:
    """Asks for the line at an address, which may be any, so that it is in the cache soon."""

    def generate(context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        pointer, number = _BYTE.as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        # To read, into the nearest cache, as data.
        builder.call(fetch, [_pointer(builder, values[0], _BYTE), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _settling(_typing: Any) -> Any:
    """Orders what was stored past the caches before whatever is stored next."""

    def generate(context: Any, builder: Any, _signature: Any, _values: Sequence[Any]) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _hashing(_typing: Any, _function: Any, _address: Any, _length: Any) -> Any:
    """Calls the function of (address, length) at an address."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        kind = ir.FunctionType(_WORD, [_WORD, _WORD])
        return builder.call(_pointer(builder, values[0], kind), values[1:])

    return types.uint64(types.int64, types.int64, types.int64), generate


_copy: Final[Any] = intrinsic(_copying)
_stream_line: Final[Any] = intrinsic(_streaming)
_fetch: Final[Any] = intrinsic(_fetching)
_settle: Final[Any] = intrinsic(_settling)
_hash: Final[Any] = intrinsic(_hashing)


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
            for line in range(0, 4 * LINE_BYTES, LINE_BYTES):
                _fetch(wanted + line)
                _stream_line(write + at + line, read + at + line)
    _settle()


def _hash_loop(reads: Addresses, length: int, function: int, sums: Sums) -> None:
    for row in range(reads.shape[0]):
        sums[row] = _hash(function, reads[row], length)


def _copy_hash_loop(reads: Addresses, writes: Addresses, length: int, function: int, sums: Sums) -> None:
    last = reads.shape[0] - 1
    for row in range(reads.shape[0]):
        _copy(writes[row], reads[row], length)
        # What the next row begins with comes, with its places in the page table, while this one is hashed.
        following = min(row + 1, last)
        for page in range(0, min(length, MOST_AHEAD_BYTES), PAGE_BYTES):
            for line in range(page, page + 2 * LINE_BYTES, LINE_BYTES):
                _fetch(reads[following] + line)
                _fetch(writes[following] + line)
        sums[row] = _hash(function, writes[row], length)


_copy_rows: Final = _compiled("void(i8[::1], i8[::1], i8)", _copy_loop)
_stream_rows: Final = _compiled("void(i8[::1], i8[::1], i8)", _stream_loop)
_hash_rows: Final = _compiled("void(i8[::1], i8, i8, u8[::1])", _hash_loop)
_copy_hash_rows: Final = _compiled("void(i8[::1], i8[::1], i8, i8, u8[::1])", _copy_hash_loop)


def _xxh3_address() -> int | None:
    """Where the xxhash extension has XXH3-64 of (address, length); None where only Python can call it."""
    try:
        library = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__)
    except (ImportError, OSError):
        return None
    # The first chooses by what the CPU can do; it exists on x86 only.
    for name in ("XXH3_64bits_dispatch", "XXH3_64bits"):
        if hasattr(library, name):
            return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    return None


_XXH3: Final = _xxh3_address()


def copy_rows(reads: Addresses, writes: Addresses, length: int) -> None:
    """Copies `length` bytes from each address to the one at its place."""
    if len(reads) * length >= STREAM_BYTES and _streams(writes, length):
        _stream_rows(reads, writes, length)
    else:
        _copy_rows(reads, writes, length)


def hash_rows(reads: Addresses, length: int) -> Sums:
    """XXH3-64 of the `length` bytes at each address, uint64 [rows]."""
    if _XXH3 is None:
        return np.array([_digest(int(address), length) for address in reads], dtype=np.uint64)
    sums = np.empty(len(reads), dtype=np.uint64)
    _hash_rows(reads, length, _XXH3, sums)
    return sums


def copy_and_hash_rows(reads: Addresses, writes: Addresses, length: int) -> Sums:
    """Copies as `copy_rows`, and gives the XXH3-64 of what then lies at each written address, uint64 [rows].

    A row is hashed right after it was copied: it is in the core's cache still.
    """
    if _XXH3 is None:
        _copy_rows(reads, writes, length)
        return hash_rows(writes, length)
    sums = np.empty(len(reads), dtype=np.uint64)
    _copy_hash_rows(reads, writes, length, _XXH3, sums)
    return sums


def _streams(writes: Addresses, length: int) -> bool:
    aligned = not np.bitwise_or.reduce(writes) % LINE_BYTES
    return bool(aligned and not length % (4 * LINE_BYTES))


def _digest(address: int, length: int) -> int:
    return block_checksum(memoryview((ctypes.c_ubyte * length).from_address(address)))
