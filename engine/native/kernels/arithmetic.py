"""Edge: what numba lacks for the kernels: numbers at an address, this thread's share, a vectorisable exp."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

in_order = njit(fastmath={"contract", "nsz"}, error_model="numpy")
"""Compiles a loop in which a product and a sum may become one fused multiply-add."""

in_any_order = njit(fastmath={"contract", "nsz", "reassoc"}, error_model="numpy")
"""As `in_order`, and sums may be reordered, without which they cannot be vectorised."""

thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
team_size = types.ExternalFunction("omp_get_num_threads", types.int32())

_LOG2E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_LEAST = np.float32(-87.0)
_LARGEST = np.float32(88.0)
_C2 = np.float32(5.0000001201e-1)
_C3 = np.float32(1.6666665459e-1)
_C4 = np.float32(4.1665795894e-2)
_C5 = np.float32(8.3334519073e-3)
_C6 = np.float32(1.3981999507e-3)
_C7 = np.float32(1.9875691500e-4)
_ONE = np.float32(1.0)


@intrinsic
def floats(_typing, _address):
    """The float32 numbers at an address."""

    def generate(_context, builder, _signature, values):
        return builder.inttoptr(values[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def halves(_typing, _address):
    """The bfloat16 numbers at an address, as the upper halves of float32 ones."""

    def generate(_context, builder, _signature, values):
        return builder.inttoptr(values[0], ir.IntType(16).as_pointer())

    return types.CPointer(types.uint16)(types.int64), generate


@intrinsic
def advanced(_typing, pointer, _count):
    """A pointer to the number so many numbers further."""

    def generate(_context, builder, _signature, values):
        return builder.gep(values[0], [values[1]])

    return pointer(pointer, types.int64), generate


@intrinsic
def as_floats(_typing, pointer):
    """The same address, taken as that of float32 numbers."""

    def generate(_context, builder, _signature, values):
        return builder.bitcast(values[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(pointer), generate


@intrinsic
def read(_typing, pointer, _index):
    """A number among those at a pointer, as float32."""

    def generate(_context, builder, _signature, values):
        found = builder.load(builder.gep(values[0], [values[1]]))
        if pointer.dtype == types.float32:
            return found
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(found, word), word(16)), ir.FloatType())

    return types.float32(pointer, types.int64), generate


@intrinsic
def write(_typing, pointer, _index, _number):
    """Puts a float32 among the numbers at a pointer, rounded to the nearest, to even among equals."""

    def generate(context, builder, _signature, values):
        number = values[2]
        if pointer.dtype != types.float32:
            number = _upper_half(builder, number)
        builder.store(number, builder.gep(values[0], [values[1]]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.float32), generate


def _upper_half(builder, number):
    """bfloat16's bits of a float32; what is no number stays none."""
    word = ir.IntType(32)
    bits = builder.bitcast(number, word)
    odd = builder.and_(builder.lshr(bits, word(16)), word(1))
    rounded = builder.add(builder.add(bits, word(0x7FFF)), odd)
    quiet = builder.or_(bits, word(0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", number, number), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, word(16)), ir.IntType(16))


@intrinsic
def number_bytes(_typing, pointer):
    """The size of the numbers at a pointer."""

    def generate(_context, _builder, _signature, _values):
        return ir.IntType(64)(pointer.dtype.bitwidth // 8)

    return types.int64(pointer), generate


@intrinsic
def integers(_typing, _address):
    """The int64 numbers at an address."""

    def generate(_context, builder, _signature, values):
        return builder.inttoptr(values[0], ir.IntType(64).as_pointer())

    return types.CPointer(types.int64)(types.int64), generate


@intrinsic
def octets(_typing, _address):
    """The eight-bit numbers at an address."""

    def generate(_context, builder, _signature, values):
        return builder.inttoptr(values[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.int8)(types.int64), generate


@intrinsic
def prefetch(_typing, pointer):
    """Asks for the cache line of a pointer, which may be any."""

    def generate(context, builder, _signature, values):
        line, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [line, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(values[0], line), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(pointer), generate


@intrinsic
def _nearest(_typing, _number):
    """A float32 rounded to the nearest whole one."""

    def generate(_context, builder, _signature, values):
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()]), values)

    return types.float32(types.float32), generate


@intrinsic
def _power_of_two(_typing, _exponent):
    """2 to a whole float32 exponent between -126 and 127, put together from its bits."""

    def generate(_context, builder, _signature, values):
        word = ir.IntType(32)
        biased = builder.add(builder.fptosi(values[0], word), word(127))
        return builder.bitcast(builder.shl(biased, word(23)), ir.FloatType())

    return types.float32(types.float32), generate


@in_order
def exponential(number):
    """e to a float32 held between -87 and 88, off by at most two units in the last place.

    The polynomial of Cephes' expf (Moshier): x = n ln 2 + r with |r| <= ln 2 / 2.
    """
    held = min(max(number, _LEAST), _LARGEST)
    whole = _nearest(held * _LOG2E)
    rest = held - whole * _LN2_HIGH - whole * _LN2_LOW
    series = _C7 * rest + _C6
    series = series * rest + _C5
    series = series * rest + _C4
    series = series * rest + _C3
    series = series * rest + _C2
    return (series * rest * rest + rest + _ONE) * _power_of_two(whole)


@njit
def share(items):
    """First and end of this thread's part of `items` things."""
    threads, mine = np.int64(team_size()), np.int64(thread_number())
    return items * mine // threads, items * (mine + 1) // threads
