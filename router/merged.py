"""Edge: the updates of several requests, as one iterator."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from router.request import GenerationRequest, GenerationUpdate
from router.service_core import RouterCore

WAITING_UPDATES = 4
"""Updates of one request that may wait for the reader; more tokens gather inside the next one."""

Item = tuple[int, GenerationUpdate | Exception | None]


@asynccontextmanager
async def merged(
    core: RouterCore, requests: Sequence[GenerationRequest]
) -> AsyncIterator[AsyncIterator[tuple[int, GenerationUpdate]]]:
    """(index of the request, update) in the order they come, until all requests are finished.

    An error of one request is raised and ends all; leaving the block cancels what still runs.
    """
    items: asyncio.Queue[Item] = asyncio.Queue(WAITING_UPDATES * len(requests))
    tasks = [asyncio.create_task(_follow(core, at, request, items)) for at, request in enumerate(requests)]
    try:
        yield _until_all_finished(items, len(requests))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(
    core: RouterCore, at: int, request: GenerationRequest, items: "asyncio.Queue[Item]"
) -> None:
    try:
        async with aclosing(core.generate(request)) as updates:
            async for update in updates:
                await items.put((at, update))
    except Exception as error:
        # Not swallowed: the reader raises it.
        await items.put((at, error))
    else:
        await items.put((at, None))


async def _until_all_finished(
    items: "asyncio.Queue[Item]", running: int
) -> AsyncIterator[tuple[int, GenerationUpdate]]:
    while running:
        at, item = await items.get()
        if isinstance(item, Exception):
            raise item
        if item is None:
            running -= 1
        else:
            yield at, item
