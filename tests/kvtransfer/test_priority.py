"""Turns go to the highest priority that waits, and none is lost."""

import asyncio

from kvtransfer.handoffs.priority import PriorityGate


async def test_highest_priority_that_waits_goes_first() -> None:
    gate, order = PriorityGate(1), list[str]()

    async def take(name: str, priority: int) -> None:
        async with gate.turn(priority):
            order.append(name)
            await asyncio.sleep(0)

    waiting = (("low", -5), ("first usual", 0), ("high", 9), ("second usual", 0))
    async with gate.turn(0):
        tasks = [asyncio.create_task(take(name, priority)) for name, priority in waiting]
        await asyncio.sleep(0)
        assert order == []
    await asyncio.gather(*tasks)
    assert order == ["high", "first usual", "second usual", "low"]


async def test_cancelled_waiter_gives_its_turn_on() -> None:
    gate = PriorityGate(1)
    ran = asyncio.Event()

    async def wait() -> None:
        async with gate.turn(0):
            ran.set()

    async with gate.turn(0):
        first, second = asyncio.create_task(wait()), asyncio.create_task(wait())
        await asyncio.sleep(0)
    # The turn is already the first waiter's, which never gets to use it.
    first.cancel()
    await asyncio.wait((first,))
    async with asyncio.timeout(1):
        await second
    assert ran.is_set()
    async with asyncio.timeout(1), gate.turn(0):
        pass


async def test_no_more_than_the_slots_are_in_at_one_time() -> None:
    gate, inside, most = PriorityGate(3), 0, 0

    async def work() -> None:
        nonlocal inside, most
        async with gate.turn(0):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(work())
    assert most == 3
