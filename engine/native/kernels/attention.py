"""Edge: attention of few tokens a sequence over KV blocks in place; stores the tokens' own K and V first.

One thread takes some K/V heads of a sequence with all query heads that share them, so nothing waits for
another thread, and what a sequence gets does not depend on which others are beside it.
"""

import numpy as np
from numba import njit

from engine.native.kernels.arithmetic import (
    exponential,
    floats,
    in_any_order,
    in_order,
    integers,
    prefetch,
    team_size,
    thread_number,
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
def _dot_four(query, first, second, third, fourth, head_dim, out):
    """One query times four keys."""
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
def _mix_four(weights, first, second, third, fourth, head_dim, out):
    """out += four weighted values."""
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
        query, out = floats(queries + 4 * head * head_dim), scores + 4 * head * width
        at = 0
        while at + 4 <= rows:
            key = block + 4 * at * row
            _dot_four(
                query, floats(key), floats(key + 4 * row), floats(key + 8 * row), floats(key + 12 * row),
                head_dim, floats(out + 4 * at),
            )  # fmt: skip
            at += 4
        while at < rows:
            floats(out + 4 * at)[0] = _dot(query, floats(block + 4 * at * row), head_dim)
            at += 1


@njit
def _mixed_of(block, rows, row, weights, group, head_dim, width, out):
    """Adds a block's weighted values of one head to each output."""
    for head in range(group):
        own, target = weights + 4 * head * width, floats(out + 4 * head * head_dim)
        at = 0
        while at + 4 <= rows:
            value = block + 4 * at * row
            _mix_four(
                floats(own + 4 * at), floats(value), floats(value + 4 * row), floats(value + 8 * row),
                floats(value + 12 * row), head_dim, target,
            )  # fmt: skip
            at += 4
        while at < rows:
            _mix(floats(own + 4 * at)[0], floats(block + 4 * at * row), head_dim, target)
            at += 1


@njit
def _fetch(pool, table, part, last, shape, heads):
    """Asks for a block's keys and values of some heads: no processor foresees where the next block lies."""
    size, row, head_dim, _, block_stride, value_offset, _ = shape
    if part > last:
        return
    block = pool + 4 * table[part] * block_stride
    for token in range(size):
        for line in range(0, 4 * heads * head_dim, LINE_BYTES):
            prefetch(block + 4 * token * row + line)
            prefetch(block + 4 * (value_offset + token * row) + line)


@njit
def _attend_token(pool, table, first, end, heads, shape, queries, scores, width, out):
    """One token's queries of `heads` K/V heads over positions first .. end-1.

    `pool` is where the first head's keys of block 0 would be; `shape` as in `_attend_heads`.
    """
    size, row, head_dim, group, block_stride, value_offset, scale = shape
    last, ahead = (end - 1) // size, max(1, AHEAD_TOKENS // size)
    for part in range(first // size, last + 1):
        _fetch(pool, table, part + ahead, last, shape, heads)
        begin, stop = max(first, part * size), min(end, (part + 1) * size)
        block = pool + 4 * (table[part] * block_stride + (begin - part * size) * row)
        for head in range(heads):
            own = head * group
            _scores_of(
                block + 4 * head * head_dim, stop - begin, row, queries + 4 * own * head_dim, group, head_dim,
                scores + 4 * (own * width + begin - first), width,
            )  # fmt: skip
    for head in range(heads * group):
        mine = floats(scores + 4 * head * width)
        mine[end - first] = _softmax(mine, end - first, scale)
        target = floats(out + 4 * head * head_dim)
        for at in range(head_dim):
            target[at] = _ZERO
    for part in range(first // size, last + 1):
        begin, stop = max(first, part * size), min(end, (part + 1) * size)
        block = pool + 4 * (table[part] * block_stride + value_offset + (begin - part * size) * row)
        for head in range(heads):
            own = head * group
            _mixed_of(
                block + 4 * head * head_dim, stop - begin, row, scores + 4 * (own * width + begin - first),
                group, head_dim, width, out + 4 * own * head_dim,
            )  # fmt: skip
    for head in range(heads * group):
        inverse = floats(scores + 4 * (head * width + end - first))[0]
        target = floats(out + 4 * head * head_dim)
        for at in range(head_dim):
            target[at] *= inverse


@njit
def _copy(source, target, count):
    for at in range(count):
        target[at] = source[at]


@njit
def _store(pool, table, start, tokens, heads, shape, rows, strides):
    """Writes some heads' K and V of a sequence's tokens, at two addresses, into their blocks."""
    size, row, head_dim, _, block_stride, value_offset, _ = shape
    for token in range(tokens):
        position = start + token
        place = pool + 4 * (table[position // size] * block_stride + position % size * row)
        _copy(floats(rows[0] + 4 * token * strides[0]), floats(place), heads * head_dim)
        _copy(floats(rows[1] + 4 * token * strides[1]), floats(place + 4 * value_offset), heads * head_dim)


@njit
def _attend_heads(given, index, head, heads, scores):
    """K/V heads head .. head+heads-1 of one sequence of `attend`, with scratch of its own."""
    kv_heads, group, head_dim, width = given[12], given[13], given[14], given[20]
    shape = (given[11], kv_heads * head_dim, head_dim, group, given[9], given[10], floats(given[15])[0])
    sequence = integers(given[16] + 8 * SEQUENCE_FIELDS * index)
    row, tokens, start = sequence[0], sequence[1], sequence[2]
    table, pool = integers(given[17] + 8 * sequence[3]), given[8] + 4 * head * head_dim
    keys = given[1] + 4 * (row * given[5] + head * head_dim)
    values = given[2] + 4 * (row * given[6] + head * head_dim)
    _store(pool, table, start, tokens, heads, shape, (keys, values), (given[5], given[6]))
    for token in range(tokens):
        end = start + token + 1
        first = max(0, end - given[18]) if given[18] > 0 else 0
        queries = given[0] + 4 * ((row + token) * given[4] + head * group * head_dim)
        out = given[3] + 4 * ((row + token) * given[7] + head * group * head_dim)
        _attend_token(pool, table, first, end, heads, shape, queries, scores, width, out)


def attend(arguments):
    """Arguments: queries, keys, values, out (0 to 3), strides of a token in each of them (4 to 7), keys of
    the layer in block 0 (8), block stride, offset of values, block size, K/V heads, queries of each, head_dim
    (14), address of the scale, sequences, tables, window (0: none), scratch (19), its width, bounds of each
    share of sequences * K/V heads, number of shares (22).

    Scratch is [shares, heads, width], with a width above the longest context.
    """
    given = integers(arguments)
    kv_heads, bounds, shares = given[12], integers(given[21]), given[22]
    for share in range(np.int64(thread_number()), shares, np.int64(team_size())):
        scores = given[19] + 4 * share * kv_heads * given[13] * given[20]
        item = bounds[share]
        while item < bounds[share + 1]:
            head = item % kv_heads
            heads = min(kv_heads - head, bounds[share + 1] - item)
            _attend_heads(given, item // kv_heads, head, heads, scores)
            item += heads
