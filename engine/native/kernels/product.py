"""Edge: few rows times a weight that lies in tiles of 64 outputs, as oneDNN reorders it for AVX-512.

A weight [out, in] is [out / 64, in, 64]: a tile streams through memory once while the sums of up to six rows
and 64 outputs stay in registers. Every output is summed in the order of `in`, whatever rows are beside it.
"""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.native.kernels.arithmetic import floats, integers, share

TILE = 64
"""Outputs of a tile."""

MOST_ROWS = 6
"""Of a tile's sums: with four vectors of 16 each they leave room for the weights among 32 registers."""


def _tile_of(rows):
    """A kernel for one tile and a fixed number of rows."""

    @intrinsic
    def multiply(_typing, _left, _stride, _weight, _length, _out, _out_stride):
        """left [rows, length] times a tile [length, 64] to out [rows, 64]."""
        return types.void(*[types.int64] * 6), generate

    def generate(context, builder, _signature, values):
        _accumulate(builder, rows, *values)
        return context.get_dummy_value()

    return multiply


def _accumulate(builder, rows, left, stride, weight, length, out, out_stride):
    number, word, index = ir.FloatType(), ir.IntType(64), ir.IntType(32)
    vector = ir.VectorType(number, TILE)
    fused = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{TILE}f32"
    )
    lines = [
        builder.inttoptr(builder.add(left, builder.mul(stride, word(4 * row))), number.as_pointer())
        for row in range(rows)
    ]
    tiles, results = (builder.inttoptr(address, number.as_pointer()) for address in (weight, out))
    before, loop = builder.block, builder.append_basic_block("inputs")
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(word)
    at.add_incoming(word(0), before)
    sums = [builder.phi(vector) for _ in range(rows)]
    weights = builder.load(_vector_at(builder, tiles, builder.mul(at, word(TILE)), vector), align=4)
    following = builder.add(at, word(1))
    at.add_incoming(following, loop)
    for line, total in zip(lines, sums, strict=True):
        single = builder.load(builder.gep(line, [at]), align=4)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), single, index(0))
        spread = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(index, TILE), [0] * TILE))
        total.add_incoming(ir.Constant(vector, None), before)
        total.add_incoming(builder.call(fused, [spread, weights, total]), loop)
    done = builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("<", following, length), loop, done)
    builder.position_at_end(done)
    for row, total in enumerate(sums):
        place = _vector_at(builder, results, builder.mul(out_stride, word(row)), vector)
        builder.store(total.incomings[1][0], place, align=4)


def _vector_at(builder, pointer, offset, vector):
    return builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())


_one, _two, _three, _four, _five, _six = (_tile_of(rows) for rows in range(1, MOST_ROWS + 1))


@njit
def _multiply(rows, left, stride, weight, length, out, out_stride):
    if rows == 1:
        _one(left, stride, weight, length, out, out_stride)
    elif rows == 2:
        _two(left, stride, weight, length, out, out_stride)
    elif rows == 3:
        _three(left, stride, weight, length, out, out_stride)
    elif rows == 4:
        _four(left, stride, weight, length, out, out_stride)
    elif rows == 5:
        _five(left, stride, weight, length, out, out_stride)
    else:
        _six(left, stride, weight, length, out, out_stride)


@njit
def _add_bias(bias, out, rows, out_stride):
    for row in range(rows):
        for at in range(TILE):
            out[row * out_stride + at] += bias[at]


def product(arguments):
    """Arguments: rows, their stride, weight, in, out, out's stride, number of rows, tiles, bias (0: none)."""
    given = integers(arguments)
    left, stride, weight, length = given[0], given[1], given[2], given[3]
    out, out_stride, rows, bias = given[4], given[5], given[6], given[8]
    groups = (rows + MOST_ROWS - 1) // MOST_ROWS
    first, end = share(given[7])
    for tile in range(first, end):
        target = out + 4 * TILE * tile
        begin = 0
        for group in range(groups):
            stop = rows * (group + 1) // groups
            _multiply(
                stop - begin, left + 4 * begin * stride, stride, weight + 4 * TILE * length * tile, length,
                target + 4 * begin * out_stride, out_stride,
            )  # fmt: skip
            begin = stop
        if bias != 0:
            _add_bias(floats(bias + 4 * TILE * tile), floats(target), rows, out_stride)
