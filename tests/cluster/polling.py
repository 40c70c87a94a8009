"""Edge: waits, with a bound, for what other processes do."""

import asyncio
from collections.abc import Awaitable, Callable


async def eventually(holds: Callable[[], Awaitable[bool]], bound_s: float = 5.0) -> None:
    """Returns when the condition holds. Raises TimeoutError after the bound."""
    async with asyncio.timeout(bound_s):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.03)
