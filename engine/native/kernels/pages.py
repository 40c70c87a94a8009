"""Edge: loops over the rows of a paged KV pool of float32 or eight bits, over all its pages or chosen ones.

A pool is flat here: `numbers` holds its rows, `scales` are the same bytes as float32. A row is one head's K
or V of one token: head_dim numbers, in an eight-bit pool followed by their scale. `shape` is (layers,
block_size, kv_heads, row_numbers, head_dim). A pool without scales comes with `scales` [1.0] and `scaled` 0.
One thread takes a K/V head of a sequence with all query heads that share it.
"""

from math import sqrt

import numpy as np
from numba import carray, njit

from engine.native.kernels.arithmetic import (
    exponential,
    floats,
    in_any_order,
    integers,
    octets,
    team_size,
    thread_number,
)

LARGEST = 127.0
"""The largest magnitude of an eight-bit number."""

POOL_FIELDS = 10
"""Of a pool: addresses of numbers and scales, their counts, whether it is scaled, the five of `shape`."""

SEQUENCE_FIELDS = 5
"""Of a sequence: row of its token, the token's slot, where its block table begins in the list of all, the
address of its scores [layers, kv_heads, capacity] (0: none) and their capacity."""


@njit(inline="always")
def _row(shape, block, layer, which, offset, head):
    """Index of the first number of a row; `which` 0 is K, 1 is V."""
    layers, size, kv_heads, row, _ = shape
    return ((((block * layers + layer) * 2 + which) * size + offset) * kv_heads + head) * row


@in_any_order
def _put_row(numbers, scales, scaled, first, source):
    """Writes a float32 row [head_dim]; in an eight-bit pool as round(x / scale), scale = largest / 127.

    No eight-bit number is off by more than scale / 2.
    """
    head_dim = source.shape[0]
    target = numbers[first : first + head_dim]
    if not scaled:
        for at in range(head_dim):
            target[at] = source[at]
        return
    largest = np.float32(0.0)
    for at in range(head_dim):
        largest = max(largest, abs(source[at]))
    scales[(first + head_dim) // 4] = largest / np.float32(LARGEST)
    inverse = np.float32(LARGEST) / largest if largest > 0 else np.float32(0.0)
    for at in range(head_dim):
        target[at] = np.rint(source[at] * inverse)


@in_any_order
def _extend(shape, numbers, scales, scaled, layer, head, block, offset, bounds):
    """Takes a key, as stored, into the least and greatest of its block's; a block's first starts them anew.

    `bounds` [num_blocks, layers, kv_heads, 2, head_dim] float32.
    """
    head_dim = shape[4]
    first = _row(shape, block, layer, 0, offset, head)
    scale = scales[(first + head_dim) // 4 * scaled]
    key = numbers[first : first + head_dim]
    least, greatest = bounds[block, layer, head, 0], bounds[block, layer, head, 1]
    for at in range(head_dim):
        number = np.float32(key[at]) * scale
        least[at] = number if offset == 0 else min(least[at], number)
        greatest[at] = number if offset == 0 else max(greatest[at], number)


@in_any_order
def choose_pages(layer, head, queries, bounds, table, first, last, pages):
    """The pages (blocks by their place in the sequence) in which a query may find its largest scores.

    queries [group, head_dim] share a K/V head; `first` and `last` are the pages that they see at both ends of
    `table`. Writes len(pages) places in ascending order and returns their number, or -1 for all. The last
    page is always among them; the others have the largest bounds of q . k over all k between their least and
    greatest keys (Quest, section 3.3), where a page's bound is the largest of the queries' (NaN: the least).
    """
    wanted = pages.shape[0]
    if last - first < wanted:
        return -1
    bound = np.empty(last - first, np.float32)
    for page in range(first, last):
        block = table[page]
        least, greatest = bounds[block, layer, head, 0], bounds[block, layer, head, 1]
        best = np.float32(-np.inf)
        for member in range(queries.shape[0]):
            query = queries[member]
            total = np.float32(0.0)
            for at in range(query.shape[0]):
                total += max(query[at] * least[at], query[at] * greatest[at])
            best = max(best, total)
        bound[page - first] = best if best == best else -np.inf
    largest_places(bound, wanted - 1, first, pages)
    pages[wanted - 1] = last
    return wanted


@njit
def largest_places(bound, count, first, found):
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


@in_any_order
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


@in_any_order
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


@in_any_order
def _softmax(scores, factor):
    """exp(factor * score), normalised, in place."""
    largest = scores[0]
    for place in range(scores.shape[0]):
        largest = max(largest, scores[place])
    total = np.float32(0.0)
    for place in range(scores.shape[0]):
        weight = exponential((scores[place] - largest) * factor)
        scores[place] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for place in range(scores.shape[0]):
        scores[place] *= inverse


@in_any_order
def _attend(shape, numbers, scales, scaled, layer, head, queries, table, seen, pages, count, weights, mixed):
    """Softmax attention of a group's queries [group, head_dim] over `count` chosen pages, or all for -1.

    `seen` are the first and last slot that the queries see. Writes weights [group, seen slots in order] and
    mixed [group, head_dim]; returns how many slots were read.
    """
    size = shape[1]
    first, last = seen
    first_page = first // size
    every = last // size - first_page + 1
    runs = every if count < 0 else count
    starts, lengths = np.empty(runs, np.int64), np.empty(runs, np.int64)
    for index in range(runs):
        page = first_page + index if count < 0 else pages[index]
        begin = max(first - page * size, 0)
        starts[index] = _row(shape, table[page], layer, 0, begin, head)
        lengths[index] = min(last + 1 - page * size, size) - begin
    read = _weigh(shape, numbers, scales, scaled, queries, starts, lengths, runs, weights)
    factor = np.float32(1.0 / sqrt(shape[4]))
    for member in range(queries.shape[0]):
        _softmax(weights[member, :read], factor)
    _mix(shape, numbers, scales, scaled, weights, starts, lengths, runs, mixed)
    return read


@in_any_order
def add_scores(weights, read, largest, scores):
    """Fuses a token's attention [group, slots] with that of the tokens before it (MorphKV, section 3).

    The heads that share K and V are added up; tokens are, too, or the `largest` of them counts.
    """
    for slot in range(read):
        total = np.float32(0.0)
        for member in range(weights.shape[0]):
            total += weights[member, slot]
        scores[slot] = max(scores[slot], total) if largest else scores[slot] + total


@njit
def _shape(given):
    return given[5], given[6], given[7], given[8], given[9]


@njit
def _bounds(address, blocks, shape):
    """Bounds at an address; of no blocks where there are none."""
    return carray(floats(address), (blocks, shape[0], shape[2], 2, shape[4]))


@njit
def _store_tokens(given, numbers, scales):
    shape, scaled, layer, tokens = _shape(given), given[4], given[10], given[11]
    blocks, offsets = integers(given[12]), integers(given[13])
    bounds = _bounds(given[18], given[19], shape)
    for head in range(np.int64(thread_number()), shape[2], np.int64(team_size())):
        for token in range(tokens):
            for which in range(2):
                source = given[14 + which] + 4 * (token * given[16 + which] + head * shape[4])
                first = _row(shape, blocks[token], layer, which, offsets[token], head)
                _put_row(numbers, scales, scaled, first, carray(floats(source), (shape[4],)))
            if given[19] > 0:
                _extend(shape, numbers, scales, scaled, layer, head, blocks[token], offsets[token], bounds)


@njit
def _read_bounds(given, numbers, scales):
    shape, scaled = _shape(given), given[4]
    blocks, offsets = integers(given[12]), integers(given[13])
    bounds = _bounds(given[14], given[15], shape)
    layers = shape[0] - given[10]
    for item in range(np.int64(thread_number()), layers * shape[2], np.int64(team_size())):
        layer, head = given[10] + item // shape[2], item % shape[2]
        for token in range(given[11]):
            _extend(shape, numbers, scales, scaled, layer, head, blocks[token], offsets[token], bounds)


@njit
def _attend_sequences(given, numbers, scales):
    shape = _shape(given)
    for item in range(np.int64(thread_number()), given[11] * shape[2], np.int64(team_size())):
        _attend_head(given, shape, numbers, scales, item // shape[2], item % shape[2])


@njit
def _attend_head(given, shape, numbers, scales, index, head):
    """One K/V head of one sequence of `attend_pages`."""
    layer, group, head_dim = given[10], given[22], shape[4]
    fields = integers(given[12] + 8 * SEQUENCE_FIELDS * index)
    row, last = fields[0], fields[1]
    first = max(last - given[18] + 1, 0) if given[18] > 0 else 0
    own = head * group * head_dim
    queries = carray(floats(given[14] + 4 * (row * given[15] + own)), (group, head_dim))
    mixed = carray(floats(given[16] + 4 * (row * given[17] + own)), (group, head_dim))
    table = carray(integers(given[13] + 8 * fields[2]), (last // shape[1] + 1,))
    pages, count = np.empty(given[21], np.int64), -1
    if given[20] > 0:
        bounds = _bounds(given[19], given[20], shape)
        count = choose_pages(layer, head, queries, bounds, table, first // shape[1], last // shape[1], pages)
    weights = np.empty((group, last - first + 1), np.float32)
    read = _attend(
        shape, numbers, scales, given[4], layer, head, queries, table, (first, last), pages, count, weights,
        mixed,
    )  # fmt: skip
    if fields[3] > 0:
        scores = fields[3] + 4 * (layer * shape[2] + head) * fields[4]
        add_scores(weights, read, given[23], carray(floats(scores), (fields[4],)))


def store_tokens(arguments):
    """Arguments: the pool (0 to 9), layer, tokens, their blocks, offsets, K, V (15), numbers between two
    tokens of K and of V, bounds to extend, their blocks (19; 0: none)."""
    given = integers(arguments)
    scales = carray(floats(given[1]), (given[3],))
    if given[4]:
        _store_tokens(given, carray(octets(given[0]), (given[2],)), scales)
    else:
        _store_tokens(given, carray(floats(given[0]), (given[2],)), scales)


def read_bounds(arguments):
    """Arguments: the pool (0 to 9), first layer, tokens, their blocks, offsets, bounds, their blocks (15).

    Takes the keys of tokens in all layers from the first into their blocks' bounds, in order.
    """
    given = integers(arguments)
    scales = carray(floats(given[1]), (given[3],))
    if given[4]:
        _read_bounds(given, carray(octets(given[0]), (given[2],)), scales)
    else:
        _read_bounds(given, carray(floats(given[0]), (given[2],)), scales)


def attend_pages(arguments):
    """Arguments: the pool (0 to 9), layer, number of sequences, they, their tables, queries (14), numbers
    between two tokens' queries, out, between two tokens' in out, window (0: none), bounds, their blocks (20;
    0: all pages are read), pages to choose, queries a K/V head, whether scores take the largest (23)."""
    given = integers(arguments)
    scales = carray(floats(given[1]), (given[3],))
    if given[4]:
        _attend_sequences(given, carray(octets(given[0]), (given[2],)), scales)
    else:
        _attend_sequences(given, carray(floats(given[0]), (given[2],)), scales)


@njit
def _keep_rows(given, numbers):
    shape, keep = _shape(given), given[10]
    layers, size, kv_heads, row, _ = shape
    source, target = integers(given[12]), integers(given[13])
    for item in range(np.int64(thread_number()), layers * kv_heads, np.int64(team_size())):
        layer, head = item // kv_heads, item % kv_heads
        kept = integers(given[11] + 8 * item * keep)
        for slot in range(keep):
            old = kept[slot]
            if old == slot and source[old // size] == target[slot // size]:
                continue
            for which in range(2):
                first = _row(shape, source[old // size], layer, which, old % size, head)
                place = _row(shape, target[slot // size], layer, which, slot % size, head)
                for at in range(row):
                    numbers[place + at] = numbers[first + at]


def keep_rows(arguments):
    """Arguments: the pool (0 to 9), how many slots stay, which [layers, kv_heads, slots] ascending, the
    tables of blocks that they lie in and go to (13).

    No slot goes to a later one, and none into a block of others: what is still to be read is not overwritten.
    """
    given = integers(arguments)
    if given[4]:
        _keep_rows(given, carray(octets(given[0]), (given[2],)))
    else:
        _keep_rows(given, carray(floats(given[0]), (given[2],)))
