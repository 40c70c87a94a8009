"""Edge: what happens to each row of a batch between two matrix products."""

from math import sqrt

import numpy as np
from numba import njit

from engine.native.kernels.arithmetic import (
    advanced,
    exponential,
    floats,
    halves,
    in_any_order,
    in_order,
    integers,
    read,
    share,
    write,
)

_ONE = np.float32(1.0)


@njit
def _copy(source, target, count):
    for at in range(count):
        write(target, at, read(source, at))


@njit
def _embed(given, embeddings):
    ids, columns = integers(given[1]), given[4]
    first, end = share(given[3])
    for index in range(first, end):
        _copy(advanced(embeddings, ids[index] * columns), floats(given[2] + 4 * index * columns), columns)


def embed(arguments):
    """Arguments: embeddings, token ids, out, number of rows, columns."""
    given = integers(arguments)
    _embed(given, floats(given[0]))


def embed_halves(arguments):
    """As `embed`, of embeddings in bfloat16."""
    given = integers(arguments)
    _embed(given, halves(given[0]))


@in_any_order
def _square_sum(row, columns):
    total = np.float32(0.0)
    for at in range(columns):
        total += row[at] * row[at]
    return total


@in_order
def _norm_row(row, update, adds, weight, out, columns, epsilon):
    if adds:
        for at in range(columns):
            row[at] += update[at]
    scale = _ONE / np.float32(sqrt(_square_sum(row, columns) / np.float32(columns) + epsilon))
    for at in range(columns):
        out[at] = row[at] * scale * weight[at]


def add_norm(arguments):
    """Arguments: rows, update (0: none), weight, out, number of rows, columns, address of epsilon, out once
    more in bfloat16 (0: not wanted).
    """
    given = integers(arguments)
    columns, weight, epsilon = given[5], floats(given[2]), floats(given[6])[0]
    first, end = share(given[4])
    for index in range(first, end):
        at = 4 * index * columns
        out = floats(given[3] + at)
        _norm_row(
            floats(given[0] + at), floats(given[1] + at), given[1] != 0, weight, out, columns, epsilon,
        )  # fmt: skip
        if given[7] != 0:
            _copy(out, halves(given[7] + at // 2), columns)


@in_order
def _turn_head(head, cosine, sine, half):
    for at in range(half):
        low, high = head[at], head[at + half]
        head[at] = low * cosine[at] - high * sine[at]
        head[at + half] = high * cosine[at] + low * sine[at]


def rotate(arguments):
    """Arguments: heads, cosines, sines, tokens, heads that turn, head_dim, stride of a token, positions.

    Cosines and sines are [positions, head_dim]; the sines' second half is theirs without a sign. Without
    positions (0) each token has a row of them.
    """
    given = integers(arguments)
    turning, head_dim, stride, positions = given[4], given[5], given[6], integers(given[7])
    half = head_dim // 2
    first, end = share(given[3])
    for token in range(first, end):
        at = positions[token] if given[7] != 0 else token
        cosine = floats(given[1] + 4 * at * head_dim)
        sine = floats(given[2] + 4 * (at * head_dim + half))
        for head in range(turning):
            _turn_head(floats(given[0] + 4 * (token * stride + head * head_dim)), cosine, sine, half)


@in_order
def _gate_row(gate, up, out, columns):
    for at in range(columns):
        out[at] = gate[at] / (_ONE + exponential(-gate[at])) * up[at]


def swiglu(arguments):
    """Arguments: gates and ups [rows, 2 * columns], out [rows, columns], number of rows, columns, out once
    more in bfloat16 (0: not wanted).
    """
    given = integers(arguments)
    columns = given[3]
    first, end = share(given[2])
    for index in range(first, end):
        gate = given[0] + 8 * index * columns
        out = floats(given[1] + 4 * index * columns)
        _gate_row(floats(gate), floats(gate + 4 * columns), out, columns)
        if given[4] != 0:
            _copy(out, halves(given[4] + 2 * index * columns), columns)
