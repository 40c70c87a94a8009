"""Edge: words in shared memory that several processes change, each by one compare-and-swap.

A word says who owns one frame of an arena. `give` and `settle` are the two halves of an exchange, frame by
frame, as docs/decisions/004-adopting-pages.md tells; no lock is held, so a process that is stopped or killed
anywhere in them holds nobody up.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Words = npt.NDArray[np.int64]
"""int64 [frames], in shared memory."""

MEMBER_BITS: Final = 28
"""Bits of a member's number: a start a second for eight years."""

NOBODY: Final = 0
"""The word of a frame that nobody owns."""

_OWNED: Final = 1 << 60
_OFFERED: Final = 2 << 60
_LEAVING: Final = 3 << 60
_KINDS: Final = 3 << 60
_MEMBERS: Final = (1 << MEMBER_BITS) - 1

_WORD: Final = ir.IntType(64)


def owned(member: int) -> int:
    """The word of a frame that a member owns."""
    return _OWNED | member


def offered(taker: int, giver: int) -> int:
    """The word of a taker's frame that a giver may have in exchange for one of its own."""
    return _OFFERED | giver << MEMBER_BITS | taker


def leaving(giver: int, taker: int) -> int:
    """The word of a giver's frame while it takes the taker's."""
    return _LEAVING | taker << MEMBER_BITS | giver


def owner_of(word: int) -> int:
    """Who owns a frame, and would lose it by an exchange that is open; 0 for nobody."""
    return word & _MEMBERS


def other_of(word: int) -> int:
    """Who gets a frame by the exchange that is open; 0 where there is none."""
    return word >> MEMBER_BITS & _MEMBERS if word & _KINDS in (_OFFERED, _LEAVING) else 0


def _swapping(_typing: Any, _address: Any, _before: Any, _after: Any) -> Any:
    """Puts `after` at an address where `before` is; what was there."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Sequence[Any]) -> Any:
        pointer = builder.inttoptr(values[0], _WORD.as_pointer())
        pair = builder.cmpxchg(pointer, values[1], values[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), generate


_swap: Final[Any] = intrinsic(_swapping)


def _compiled(signature: str, function: Callable[..., int]) -> Callable[..., int]:
    try:
        made: Callable[..., int] = njit(signature, cache=True)(function)
    except RuntimeError:
        # No place on disk may be written; it is compiled in every process then.
        made = njit(signature)(function)
    return made


def _swap_loop(address: int, frames: Words, before: int, after: int, done: npt.NDArray[np.bool_]) -> int:
    swapped = 0
    for index in range(frames.shape[0]):
        done[index] = _swap(address + 8 * frames[index], before, after) == before
        swapped += done[index]
    return swapped


def _give_loop(address: int, given: Words, taken: Words, words: Words, done: npt.NDArray[np.bool_]) -> int:
    mine, gone, offer, theirs = words[0], words[1], words[2], words[3]
    swapped = 0
    for index in range(given.shape[0]):
        ours, other = address + 8 * given[index], address + 8 * taken[index]
        done[index] = False
        if _swap(ours, mine, gone) != mine:
            continue
        if _swap(other, offer, mine) == offer:
            _swap(ours, gone, theirs)
            done[index] = True
            swapped += 1
        else:
            _swap(ours, gone, mine)
    return swapped


def _settle_loop(address: int, given: Words, taken: Words, words: Words, done: npt.NDArray[np.bool_]) -> int:
    mine, gone, offer = words[0], words[1], words[2]
    swapped = 0
    for index in range(given.shape[0]):
        if _swap(address + 8 * taken[index], offer, mine) == offer:
            done[index] = False
            continue
        # The giver has it. Should it be stopped or dead, the frame that it owes is ours all the same.
        _swap(address + 8 * given[index], gone, mine)
        done[index] = True
        swapped += 1
    return swapped


_swap_words: Final = _compiled("i8(i8, i8[::1], i8, i8, b1[::1])", _swap_loop)
_give_words: Final = _compiled("i8(i8, i8[::1], i8[::1], i8[::1], b1[::1])", _give_loop)
_settle_words: Final = _compiled("i8(i8, i8[::1], i8[::1], i8[::1], b1[::1])", _settle_loop)


def swap(words: Words, frames: Words, before: int, after: int) -> npt.NDArray[np.bool_]:
    """Which of the frames had the word `before`; they have `after` now. bool [frames]."""
    done = np.empty(len(frames), dtype=np.bool_)
    _swap_words(words.ctypes.data, frames, before, after, done)
    return done


def give(words: Words, giver: int, taker: int, given: Words, taken: Words) -> npt.NDArray[np.bool_]:
    """The giver's half: which frames of `given` are the taker's now; those opposite in `taken` are ours."""
    done = np.empty(len(given), dtype=np.bool_)
    row = (owned(giver), leaving(giver, taker), offered(taker, giver), owned(taker))
    _give_words(words.ctypes.data, given, taken, np.array(row, dtype=np.int64), done)
    return done


def settle(words: Words, giver: int, taker: int, given: Words, taken: Words) -> npt.NDArray[np.bool_]:
    """The taker's half: which frames of `given` are ours now; of the others the offer is taken back."""
    done = np.empty(len(given), dtype=np.bool_)
    row = (owned(taker), leaving(giver, taker), offered(taker, giver))
    _settle_words(words.ctypes.data, given, taken, np.array(row, dtype=np.int64), done)
    return done
