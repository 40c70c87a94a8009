"""Pure: the random number of a token, a function of where it stands and of nothing that happened before.

So a resumed, migrated or re-batched request draws what an undisturbed one would have drawn (design, rule 3).
"""

from enum import IntEnum

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_DOMAIN = 0x54616E64656D3031


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits with full avalanche."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, sample_index: int, output_index: int) -> float:
    """A number in [0, 1) with 53 random bits, for one token of one sample; inputs are taken modulo 2**64."""
    state = _mix((seed ^ _DOMAIN) & _MASK)
    state = _mix(state ^ (sample_index & _MASK))
    state = _mix(state ^ (output_index & _MASK))
    return (state >> 11) * 2.0**-53


class Purpose(IntEnum):
    """What a further number of the same token is for; numbers of different purposes are independent."""

    GUESS = 1
    ACCEPT = 2
    RESIDUAL = 3


def uniform_for(purpose: Purpose, seed: int, sample_index: int, output_index: int) -> float:
    """Like `uniform`, for what is drawn about a token besides the token itself."""
    return uniform(seed ^ _mix(purpose), sample_index, output_index)
