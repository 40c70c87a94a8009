"""Pure: one step in a transition table."""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from tandem.errors import ProtocolError

State = TypeVar("State", bound=Enum)
Input = TypeVar("Input", bound=Enum)


def next_state(table: Mapping[tuple[State, Input], State], state: State, happened: Input) -> State:
    """The state after an input; an input without a row raises ProtocolError that names both."""
    try:
        return table[state, happened]
    except KeyError:
        raise ProtocolError(f"{happened.name} is not possible in state {state.name}") from None
