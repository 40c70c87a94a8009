"""Edge: attention of few tokens a sequence over KV blocks in place; stores the tokens' own K and V first.

One thread takes some K/V heads of a sequence with all query heads that share them, so nothing waits for
another thread, and what a sequence gets does not depend on which others are beside it.
"""

import numpy as np
from numba import njit

from engine.native.kernels.arithmetic import (
    advanced,
    as_floats,
    exponential,
    floats,
    halves,
    in_any_order,
    in_order,
    integers,
    number_bytes,
    prefetch,
    read,
    team_size,
    thread_number,
    write,
)

SEQUENCE_FIELDS = 4
"""Of a sequence: first row, tokens, start, where its block table begins in the list of all."""

AHEAD_TOKENS = 16
"""How far ahead of the keys that are read others are asked for."""

LINE_BYTES = 64
"""What one prefetch brings."""

_ZERO = np.float32(0.0)
_LOWEST = np.float32(-3.0e38)


@in_any_order
def _dot_four(query, first, row, head_dim, out):
    """One query times four keys that lie `row` numbers apart."""
    second, third, fourth = advanced(first, row), advanced(first, 2 * row), advanced(first, 3 * row)
    a, b, c, d = _ZERO, _ZERO, _ZERO, _ZERO
    for at in range(head_dim):
        a += query[at] * first[at]
        b += query[at] * second[at]
        c += query[at] * third[at]
        d += query[at] * fourth[at]
    out[0], out[1], out[2], out[3] = a, b, c, d


@in_any_order
def _dot(query, key, head_dim):
    total = _ZERO
    for at in range(head_dim):
        total += query[at] * key[at]
    return total


@in_order
def _mix_four(weights, first, row, head_dim, out):
    """out += four weighted values that lie `row` numbers apart."""
    second, third, fourth = advanced(first, row), advanced(first, 2 * row), advanced(first, 3 * row)
    a, b, c, d = weights[0], weights[1], weights[2], weights[3]
    for at in range(head_dim):
        out[at] += a * first[at] + b * second[at] + c * third[at] + d * fourth[at]


@in_order
def _mix(weight, value, head_dim, out):
    for at in range(head_dim):
        out[at] += weight * value[at]


@in_any_order
def _softmax(scores, count, scale):
    """Scores become e to their scaled distance from the largest; returns one over their sum."""
    largest = _LOWEST
    for at in range(count):
        largest = max(largest, scores[at])
    total = _ZERO
    for at in range(count):
        weight = exponential((scores[at] - largest) * scale)
        scores[at] = weight
        total += weight
    return np.float32(1.0) / total


@njit
def _scores_of(block, rows, row, queries, group, head_dim, scores, width):
    """Scores of a block's `rows` keys of one head, `row` numbers apart, for each of its queries."""
    for head in range(group):
        query, out = advanced(queries, head * head_dim), advanced(scores, head * width)
        at = 0
        while at + 4 <= rows:
            _dot_four(query, advanced(block, at * row), row, head_dim, advanced(out, at))
            at += 4
        while at < rows:
            out[at] = _dot(query, advanced(block, at * row), head_dim)
            at += 1


@njit
def _mixed_of(block, rows, row, weights, group, head_dim, width, out):
    """Adds a block's weighted values of one head to each output."""
    for head in range(group):
        own, target = advanced(weights, head * width), advanced(out, head * head_dim)
        at = 0
        while at + 4 <= rows:
            _mix_four(advanced(own, at), advanced(block, at * row), row, head_dim, target)
            at += 4
        while at < rows:
            _mix(own[at], advanced(block, at * row), head_dim, target)
            at += 1


@njit
def _copy(source, target, count):
    for at in range(count):
        write(target, at, read(source, at))


@njit
def _in_float32(numbers, rows, row, head_dim, scratch):
    """Where a head's rows lie in float32, and how far apart: in place, or widened into scratch.

    Widened once, as all queries of the head read them.
    """
    if number_bytes(numbers) == 4:
        return as_floats(numbers), row
    for at in range(rows):
        _copy(advanced(numbers, at * row), advanced(scratch, at * head_dim), head_dim)
    return scratch, head_dim


@njit
def _fetch(pool, table, part, last, shape, heads):
    """Asks for a block's keys and values of some heads: no processor foresees where the next block lies."""
    size, row, head_dim, _, block_stride, value_offset, _ = shape
    if part > last:
        return
    block = advanced(pool, table[part] * block_stride)
    for token in range(size):
        for at in range(0, heads * head_dim, LINE_BYTES // number_bytes(pool)):
            prefetch(advanced(block, token * row + at))
            prefetch(advanced(block, value_offset + token * row + at))


@njit
def _attend_token(pool, table, first, end, heads, shape, queries, scratch, width, out):
    """One token's queries of `heads` K/V heads over positions first .. end-1.

    `pool` is where the first head's keys of block 0 would be; `shape` as in `_attend_heads`.
    """
    size, row, head_dim, group, block_stride, value_offset, scale = shape
    wide, scores = scratch, advanced(scratch, size * head_dim)
    last, ahead = (end - 1) // size, max(1, AHEAD_TOKENS // size)
    for part in range(first // size, last + 1):
        _fetch(pool, table, part + ahead, last, shape, heads)
        begin, stop = max(first, part * size), min(end, (part + 1) * size)
        block = advanced(pool, table[part] * block_stride + (begin - part * size) * row)
        for head in range(heads):
            own = head * group
            own_block = advanced(block, head * head_dim)
            keys, apart = _in_float32(own_block, stop - begin, row, head_dim, wide)
            _scores_of(
                keys, stop - begin, apart, advanced(queries, own * head_dim), group, head_dim,
                advanced(scores, own * width + begin - first), width,
            )  # fmt: skip
    for head in range(heads * group):
        mine = advanced(scores, head * width)
        mine[end - first] = _softmax(mine, end - first, scale)
        target = advanced(out, head * head_dim)
        for at in range(head_dim):
            target[at] = _ZERO
    for part in range(first // size, last + 1):
        begin, stop = max(first, part * size), min(end, (part + 1) * size)
        block = advanced(pool, table[part] * block_stride + value_offset + (begin - part * size) * row)
        for head in range(heads):
            own = head * group
            own_block = advanced(block, head * head_dim)
            values, apart = _in_float32(own_block, stop - begin, row, head_dim, wide)
            _mixed_of(
                values, stop - begin, apart, advanced(scores, own * width + begin - first), group, head_dim,
                width, advanced(out, own * head_dim),
            )  # fmt: skip
    for head in range(heads * group):
        inverse = scores[head * width + end - first]
        target = advanced(out, head * head_dim)
        for at in range(head_dim):
            target[at] *= inverse


@njit
def _store(pool, table, start, tokens, heads, shape, rows, strides):
    """Writes some heads' K and V of a sequence's tokens into their blocks."""
    size, row, head_dim, _, block_stride, value_offset, _ = shape
    for token in range(tokens):
        position = start + token
        place = advanced(pool, table[position // size] * block_stride + position % size * row)
        _copy(advanced(rows[0], token * strides[0]), place, heads * head_dim)
        _copy(advanced(rows[1], token * strides[1]), advanced(place, value_offset), heads * head_dim)


@njit
def _attend_heads(given, pool, index, head, heads, scratch):
    """K/V heads head .. head+heads-1 of one sequence of `attend`, with scratch of its own.

    `pool` points to the first head's keys of the layer in block 0.
    """
    kv_heads, group, head_dim, width = given[12], given[13], given[14], given[20]
    shape = (given[11], kv_heads * head_dim, head_dim, group, given[9], given[10], floats(given[15])[0])
    sequence = integers(given[16] + 8 * SEQUENCE_FIELDS * index)
    row, tokens, start = sequence[0], sequence[1], sequence[2]
    table, pool = advanced(integers(given[17]), sequence[3]), advanced(pool, head * head_dim)
    keys = advanced(floats(given[1]), row * given[5] + head * head_dim)
    values = advanced(floats(given[2]), row * given[6] + head * head_dim)
    _store(pool, table, start, tokens, heads, shape, (keys, values), (given[5], given[6]))
    for token in range(tokens):
        end = start + token + 1
        first = max(0, end - given[18]) if given[18] > 0 else 0
        queries = advanced(floats(given[0]), (row + token) * given[4] + head * group * head_dim)
        place = (row + token) * given[7] + head * group * head_dim
        out = advanced(floats(given[3]), place)
        _attend_token(pool, table, first, end, heads, shape, queries, scratch, width, out)
        if given[23] != 0:
            _copy(out, advanced(halves(given[23]), place), heads * group * head_dim)


@njit
def _attend(given, pool):
    kv_heads, bounds, shares = given[12], integers(given[21]), given[22]
    for share in range(np.int64(thread_number()), shares, np.int64(team_size())):
        numbers = given[11] * given[14] + kv_heads * given[13] * given[20]
        scratch = advanced(floats(given[19]), share * numbers)
        item = bounds[share]
        while item < bounds[share + 1]:
            head = item % kv_heads
            heads = min(kv_heads - head, bounds[share + 1] - item)
            _attend_heads(given, pool, item // kv_heads, head, heads, scratch)
            item += heads


def attend(arguments):
    """Arguments: queries, keys, values, out (0 to 3), strides of a token in each of them (4 to 7), keys of
    the layer in block 0 (8), block stride, offset of values, block size, K/V heads, queries of each, head_dim
    (14), address of the scale, sequences, tables, window (0: none), scratch (19), its width, bounds of each
    share of sequences * K/V heads, number of shares (22), out once more in bfloat16 (0: not wanted).

    Scratch is [block size, head_dim] and [heads, width] for each share, with a width above the longest
    context.
    """
    given = integers(arguments)
    _attend(given, floats(given[8]))


def attend_halves(arguments):
    """As `attend`, over a pool of bfloat16 numbers."""
    given = integers(arguments)
    _attend(given, halves(given[8]))
