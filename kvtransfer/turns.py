"""Edge: one caller at a time for each key, the others waiting for it."""

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(slots=True)
class _Turn:
    """One key's lock, and how many hold it or wait for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    callers: int = 0


class Turns(Generic[KeyT]):
    """Locks that exist while somebody uses them: keys that are never used again cost nothing.

    Held across awaits on purpose: who waits wants what the holder makes, bounded by the holder's own bounds.
    """

    def __init__(self) -> None:
        self._turns: dict[KeyT, _Turn] = {}

    def __len__(self) -> int:
        """Keys in use now."""
        return len(self._turns)

    @asynccontextmanager
    async def of(self, key: KeyT) -> AsyncIterator[None]:
        """Waits until nobody else is in with this key, in order of arrival."""
        turn = self._turns.setdefault(key, _Turn())
        turn.callers += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.callers -= 1
            if not turn.callers:
                del self._turns[key]
