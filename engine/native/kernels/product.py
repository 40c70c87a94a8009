"""Edge: few rows times a weight that lies in tiles of 64 outputs, as oneDNN reorders it for AVX-512.

A weight [out, in] is [out / 64, in, 64] in float32 and [out / 64, in / 2, 64, 2] in bfloat16: a tile streams
through memory once while the sums of up to six rows and 64 outputs stay in registers, in float32. Every
output is summed in the order of `in`, whatever rows are beside it.
"""

from dataclasses import dataclass

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.native.kernels.arithmetic import floats, integers, share

TILE = 64
"""Outputs of a tile."""

MOST_ROWS = 6
"""Of a tile's sums: with four vectors of 16 each they leave room for the weights among 32 registers."""


@dataclass(frozen=True)
class _Numbers:
    """What a weight and the rows are made of: words of 32 bits, summed in float32."""

    word: ir.Type
    lanes: int
    """Words in a vector that one multiplication takes."""
    multiplication: str
    """The name of LLVM's function."""
    sum_first: bool
    """Whether the sum so far is its first argument, or its last."""


_FLOATS = _Numbers(ir.FloatType(), TILE, f"llvm.fma.v{TILE}f32", sum_first=False)
_PAIRS = _Numbers(ir.IntType(32), 16, "llvm.x86.avx512bf16.dpbf16ps.512", sum_first=True)
"""Two bfloat16 numbers a word, for two successive inputs."""


def _tile_of(rows, numbers):
    """A kernel for one tile and a fixed number of rows."""

    @intrinsic
    def multiply(_typing, _left, _stride, _weight, _length, _out, _out_stride):
        """left [rows, length] times a tile [length, 64], in words, to float32 out [rows, 64]."""
        return types.void(*[types.int64] * 6), generate

    def generate(context, builder, _signature, values):
        _accumulate(builder, rows, numbers, *values)
        return context.get_dummy_value()

    return multiply


def _accumulate(builder, rows, numbers, left, stride, weight, length, out, out_stride):
    word, pieces = ir.IntType(64), range(TILE // numbers.lanes)
    vector, total = ir.VectorType(numbers.word, numbers.lanes), ir.VectorType(ir.FloatType(), numbers.lanes)
    lines = [
        builder.inttoptr(builder.add(left, builder.mul(stride, word(4 * row))), numbers.word.as_pointer())
        for row in range(rows)
    ]
    tiles = builder.inttoptr(weight, numbers.word.as_pointer())
    results = builder.inttoptr(out, ir.FloatType().as_pointer())
    before, loop = builder.block, builder.append_basic_block("inputs")
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(word)
    at.add_incoming(word(0), before)
    sums = [[builder.phi(total) for _ in pieces] for _ in range(rows)]
    offsets = [word(numbers.lanes * piece) for piece in pieces]
    line = builder.mul(at, word(TILE))
    weights = [
        builder.load(_vector_at(builder, tiles, builder.add(line, offset), vector), align=4)
        for offset in offsets
    ]
    following = builder.add(at, word(1))
    at.add_incoming(following, loop)
    for row, mine in zip(lines, sums, strict=True):
        spread = _spread(builder, builder.load(builder.gep(row, [at]), align=4), vector)
        for sum_, factor in zip(mine, weights, strict=True):
            sum_.add_incoming(ir.Constant(total, None), before)
            sum_.add_incoming(_multiply_add(builder, numbers, spread, factor, sum_), loop)
    done = builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("<", following, length), loop, done)
    builder.position_at_end(done)
    for row, mine in enumerate(sums):
        begin = builder.mul(out_stride, word(row))
        for sum_, offset in zip(mine, offsets, strict=True):
            place = _vector_at(builder, results, builder.add(begin, offset), total)
            builder.store(sum_.incomings[1][0], place, align=4)


def _multiply_add(builder, numbers, left, right, total):
    kinds = [total.type, left.type, right.type] if numbers.sum_first else [left.type, right.type, total.type]
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(total.type, kinds), numbers.multiplication
    )
    given = [total, left, right] if numbers.sum_first else [left, right, total]
    return builder.call(function, given)


def _spread(builder, single, vector):
    """A vector full of one word."""
    index = ir.IntType(32)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), single, index(0))
    lanes = ir.Constant(ir.VectorType(index, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, first, lanes)


def _vector_at(builder, pointer, offset, vector):
    return builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())


_one, _two, _three, _four, _five, _six = (_tile_of(rows, _FLOATS) for rows in range(1, MOST_ROWS + 1))
_half_one, _half_two, _half_three, _half_four, _half_five, _half_six = (
    _tile_of(rows, _PAIRS) for rows in range(1, MOST_ROWS + 1)
)


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
def _multiply_halves(rows, left, stride, weight, length, out, out_stride):
    if rows == 1:
        _half_one(left, stride, weight, length, out, out_stride)
    elif rows == 2:
        _half_two(left, stride, weight, length, out, out_stride)
    elif rows == 3:
        _half_three(left, stride, weight, length, out, out_stride)
    elif rows == 4:
        _half_four(left, stride, weight, length, out, out_stride)
    elif rows == 5:
        _half_five(left, stride, weight, length, out, out_stride)
    else:
        _half_six(left, stride, weight, length, out, out_stride)


@njit
def _add_bias(bias, out, rows, out_stride):
    for row in range(rows):
        for at in range(TILE):
            out[row * out_stride + at] += bias[at]


def _over_tiles(multiply):
    """The loop over a thread's tiles, compiled for each `multiply`: an argument cannot be cached."""

    @njit
    def loop(arguments):
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
                multiply(
                    stop - begin, left + 4 * begin * stride, stride, weight + 4 * TILE * length * tile,
                    length, target + 4 * begin * out_stride, out_stride,
                )  # fmt: skip
                begin = stop
            if bias != 0:
                _add_bias(floats(bias + 4 * TILE * tile), floats(target), rows, out_stride)

    return loop


_product, _product_halves = _over_tiles(_multiply), _over_tiles(_multiply_halves)


def product(arguments):
    """Arguments: rows, their stride, weight, in, out, out's stride, number of rows, tiles, bias (0: none)."""
    _product(arguments)


def product_halves(arguments):
    """As `product`, of rows and a weight in bfloat16, with `in` and the rows' stride counted in pairs."""
    _product_halves(arguments)
