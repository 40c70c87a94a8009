"""Edge: loops over the rows of a paged KV pool, compiled by numba; each runs on one thread without the GIL.

A pool is flat here: `numbers` holds its rows, `scales` are the same bytes as float32. A row is one head's K
or V of one token: head_dim numbers, in an eight-bit pool followed by their scale. `shape` is (layers,
block_size, kv_heads, row_numbers, head_dim). A pool without scales comes with `scales` [1.0] and `scaled` 0.
"""

from math import exp, sqrt

import numpy as np
from numba import njit

_FAST = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be reordered; infinities and NaN keep their meaning."""

LARGEST = 127.0
"""The largest magnitude of an eight-bit number."""


@njit(inline="always")
def _row(shape, block, layer, which, offset, head):
    """Index of the first number of a row; `which` 0 is K, 1 is V."""
    layers, size, kv_heads, row, _ = shape
    return ((((block * layers + layer) * 2 + which) * size + offset) * kv_heads + head) * row


@njit(nogil=True, fastmath=_FAST)
def store_scaled(shape, numbers, scales, layer, which, blocks, offsets, rows):
    """Writes float32 rows [tokens, kv_heads, head_dim] as eight-bit numbers, each row with its own scale.

    number = round(x / scale) and scale = largest magnitude / 127: no number is off by more than scale / 2.
    """
    head_dim = shape[4]
    for token in range(rows.shape[0]):
        for head in range(rows.shape[1]):
            source = rows[token, head]
            largest = np.float32(0.0)
            for at in range(head_dim):
                largest = max(largest, abs(source[at]))
            first = _row(shape, blocks[token], layer, which, offsets[token], head)
            target = numbers[first : first + head_dim]
            scales[(first + head_dim) // 4] = largest / np.float32(LARGEST)
            inverse = np.float32(LARGEST) / largest if largest > 0 else np.float32(0.0)
            for at in range(head_dim):
                target[at] = np.int8(np.rint(source[at] * inverse))


@njit(nogil=True, fastmath=_FAST)
def extend_bounds(shape, numbers, scales, scaled, first_layer, end_layer, blocks, offsets, bounds):
    """Takes tokens' keys, as stored, into the least and greatest of their blocks' keys.

    `bounds` [num_blocks, layers, kv_heads, 2, head_dim] float32; the first token of a block starts them anew.
    """
    head_dim = shape[4]
    for token in range(blocks.shape[0]):
        block, offset = blocks[token], offsets[token]
        for layer in range(first_layer, end_layer):
            for head in range(shape[2]):
                first = _row(shape, block, layer, 0, offset, head)
                scale = scales[(first + head_dim) // 4 * scaled]
                key = numbers[first : first + head_dim]
                least, greatest = bounds[block, layer, head, 0], bounds[block, layer, head, 1]
                for at in range(head_dim):
                    number = np.float32(key[at]) * scale
                    least[at] = number if offset == 0 else min(least[at], number)
                    greatest[at] = number if offset == 0 else max(greatest[at], number)


@njit(nogil=True, fastmath=_FAST)
def choose_pages(shape, layer, queries, bounds, table, first_seen, last_seen, pages, counts):
    """The pages (blocks by their place in the sequence) in which a query may find its largest scores.

    queries [sequences, heads, head_dim]; table [sequences, blocks]; `first_seen` and `last_seen` are the
    positions between which each query sees. Writes, per sequence and KV head, pages.shape[2] places in
    ascending order and their number, or -1 for all. The page of the last token is always among them; the
    others have the largest bounds of q . k over all k between their least and greatest keys (Quest, section
    3.3), where a page's bound is the largest of the query heads that share the KV head (NaN: the least).
    """
    size, kv_heads, head_dim = shape[1], shape[2], shape[4]
    group = queries.shape[1] // kv_heads
    wanted = pages.shape[2]
    for sequence in range(queries.shape[0]):
        first, last = first_seen[sequence] // size, last_seen[sequence] // size
        for head in range(kv_heads):
            if last - first < wanted:
                counts[sequence, head] = -1
                continue
            bound = np.empty(last - first, np.float32)
            for page in range(first, last):
                block = table[sequence, page]
                least, greatest = bounds[block, layer, head, 0], bounds[block, layer, head, 1]
                best = np.float32(-np.inf)
                for member in range(group):
                    query = queries[sequence, head * group + member]
                    total = np.float32(0.0)
                    for at in range(head_dim):
                        total += max(query[at] * least[at], query[at] * greatest[at])
                    best = max(best, total)
                bound[page - first] = best if best == best else -np.inf
            _largest(bound, wanted - 1, first, pages[sequence, head])
            pages[sequence, head, wanted - 1] = last
            counts[sequence, head] = wanted


@njit(nogil=True)
def _largest(bound, count, first, found):
    """Writes the places (from `first`) of the `count` largest, ascending; of equals the earliest."""
    if count == 0:
        return
    least = np.partition(bound, bound.shape[0] - count)[bound.shape[0] - count]
    equals = count
    for place in range(bound.shape[0]):
        equals -= bound[place] > least
    taken = 0
    for place in range(bound.shape[0]):
        equal = bound[place] == least and equals > 0
        equals -= equal
        if (bound[place] > least or equal) and taken < count:
            found[taken] = first + place
            taken += 1


@njit(nogil=True, fastmath=_FAST)
def attend_pages(
    shape, numbers, scales, scaled, layer, queries, table, first_seen, last_seen, pages, counts, attended
):
    """Softmax attention of one query a sequence over chosen pages, or all where a count is -1.

    Arguments as in choose_pages; writes attended [sequences, heads, head_dim], float32.
    """
    size, kv_heads, head_dim = shape[1], shape[2], shape[4]
    group = queries.shape[1] // kv_heads
    factor = np.float32(1.0 / sqrt(head_dim))
    for sequence in range(queries.shape[0]):
        first, last = first_seen[sequence], last_seen[sequence]
        every = last // size - first // size + 1
        weights = np.empty((group, every * size), np.float32)
        starts, lengths = np.empty(every, np.int64), np.empty(every, np.int64)
        for head in range(kv_heads):
            chosen = counts[sequence, head]
            count = chosen if chosen >= 0 else every
            for index in range(count):
                page = pages[sequence, head, index] if chosen >= 0 else first // size + index
                begin = max(first - page * size, 0)
                starts[index] = _row(shape, table[sequence, page], layer, 0, begin, head)
                lengths[index] = min(last + 1 - page * size, size) - begin
            members = slice(head * group, (head + 1) * group)
            seen = _weigh(
                shape, numbers, scales, scaled, queries[sequence, members], starts, lengths, count, weights
            )
            for member in range(group):
                _softmax(weights[member, :seen], factor)
            mixed = attended[sequence, members]
            _mix(shape, numbers, scales, scaled, weights, starts, lengths, count, mixed)


@njit(nogil=True, fastmath=_FAST)
def _weigh(shape, numbers, scales, scaled, queries, starts, lengths, count, weights):
    """q . k of a group's queries [group, head_dim] with the keys of `count` runs of rows; how many keys."""
    kv_heads, row_numbers, head_dim = shape[2], shape[3], shape[4]
    seen = 0
    for index in range(count):
        row = starts[index]
        for _ in range(lengths[index]):
            scale = scales[(row + head_dim) // 4 * scaled]
            key = numbers[row : row + head_dim]
            for member in range(queries.shape[0]):
                query = queries[member]
                total = np.float32(0.0)
                for at in range(head_dim):
                    total += query[at] * np.float32(key[at])
                weights[member, seen] = total * scale
            seen += 1
            row += kv_heads * row_numbers
    return seen


@njit(nogil=True, fastmath=_FAST)
def _mix(shape, numbers, scales, scaled, weights, starts, lengths, count, mixed):
    """The weighted sum of the values that belong to the keys of `_weigh`, into [group, head_dim]."""
    size, kv_heads, row_numbers, head_dim = shape[1], shape[2], shape[3], shape[4]
    mixed[:] = np.float32(0.0)
    seen = 0
    for index in range(count):
        row = starts[index] + size * kv_heads * row_numbers
        for _ in range(lengths[index]):
            scale = scales[(row + head_dim) // 4 * scaled]
            value = numbers[row : row + head_dim]
            for member in range(mixed.shape[0]):
                weight = weights[member, seen] * scale
                sums = mixed[member]
                for at in range(head_dim):
                    sums[at] += weight * np.float32(value[at])
            seen += 1
            row += kv_heads * row_numbers


@njit(nogil=True, fastmath=_FAST)
def _softmax(scores, factor):
    """exp(factor * score), normalised, in place."""
    largest = scores[0]
    for place in range(scores.shape[0]):
        largest = max(largest, scores[place])
    total = np.float32(0.0)
    for place in range(scores.shape[0]):
        scores[place] = exp((scores[place] - largest) * factor)
        total += scores[place]
    for place in range(scores.shape[0]):
        scores[place] /= total
