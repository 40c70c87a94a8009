"""Edge: kernels one after the other in one parallel region: nothing returns to Python between them."""

from enum import IntEnum

from numba import njit, types

from engine.native.kernels.arithmetic import integers
from engine.native.kernels.attention import attend, attend_halves
from engine.native.kernels.product import product, product_halves
from engine.native.kernels.rows import add_norm, embed, embed_halves, rotate, swiglu

WIDTH = 25
"""Numbers of an instruction: an Operation, then its kernel's arguments."""


class Operation(IntEnum):
    """Which kernel an instruction runs."""

    NORM = 0
    ROTATE = 1
    GATE = 2
    PRODUCT = 3
    EMBED = 4
    ATTEND = 5


_NORM, _ROTATE, _GATE, _PRODUCT, _EMBED = (
    int(Operation.NORM), int(Operation.ROTATE), int(Operation.GATE), int(Operation.PRODUCT),
    int(Operation.EMBED),
)  # fmt: skip

_barrier = types.ExternalFunction("GOMP_barrier", types.void())
_norm, _rotate, _gate = (njit(kernel) for kernel in (add_norm, rotate, swiglu))
_embed, _product, _attend = (njit(kernel) for kernel in (embed, product, attend))
_embed_halves, _product_halves, _attend_halves = (
    njit(kernel) for kernel in (embed_halves, product_halves, attend_halves)
)


def _loop(embedding, multiplying, attending):
    """The loop over instructions, compiled for each type: kernels that are arguments cannot be cached."""

    @njit
    def loop(arguments):
        given = integers(arguments)
        for index in range(given[1]):
            instruction = given[0] + 8 * WIDTH * index
            operation = integers(instruction)[0]
            if operation == _NORM:
                _norm(instruction + 8)
            elif operation == _ROTATE:
                _rotate(instruction + 8)
            elif operation == _GATE:
                _gate(instruction + 8)
            elif operation == _PRODUCT:
                multiplying(instruction + 8)
            elif operation == _EMBED:
                embedding(instruction + 8)
            else:
                attending(instruction + 8)
            _barrier()

    return loop


_programme = _loop(_embed, _product, _attend)
_programme_halves = _loop(_embed_halves, _product_halves, _attend_halves)


def programme(arguments):
    """Arguments: instructions [count, WIDTH], count. All threads finish one before any begins the next."""
    _programme(arguments)


def programme_halves(arguments):
    """As `programme`, over embeddings, weights and a pool in bfloat16."""
    _programme_halves(arguments)
