"""Edge: kernels one after the other in one parallel region: nothing returns to Python between them."""

from enum import IntEnum

from numba import njit, types

from engine.native.kernels.arithmetic import integers
from engine.native.kernels.attention import attend
from engine.native.kernels.product import product
from engine.native.kernels.rows import add_norm, embed, rotate, swiglu

WIDTH = 24
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
_norm, _rotate, _gate, _product, _embed, _attend = (
    njit(kernel) for kernel in (add_norm, rotate, swiglu, product, embed, attend)
)


def programme(arguments):
    """Arguments: instructions [count, WIDTH], count. All threads finish one before any begins the next."""
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
            _product(instruction + 8)
        elif operation == _EMBED:
            _embed(instruction + 8)
        else:
            _attend(instruction + 8)
        _barrier()
