"""One caller at a time for each key; a key that nobody uses is forgotten."""

import asyncio

from kvtransfer.turns import Turns


async def test_callers_of_one_key_follow_each_other_and_other_keys_do_not_wait() -> None:
    turns: Turns[str] = Turns()
    inside, order = asyncio.Event(), list[str]()

    async def wait(name: str, key: str) -> None:
        async with turns.of(key):
            order.append(name)
            inside.set()

    async with turns.of("a"):
        waiting = asyncio.create_task(wait("second", "a"))
        other = asyncio.create_task(wait("other", "b"))
        async with asyncio.timeout(5.0):
            await inside.wait()
        await other
        assert order == ["other"]
        assert len(turns) == 1
    await waiting
    assert order == ["other", "second"]


async def test_nothing_is_kept_of_a_key_once_its_callers_are_gone() -> None:
    turns: Turns[int] = Turns()

    async def wait() -> None:
        async with turns.of(1):
            raise AssertionError("it was cancelled while it waited")

    async with turns.of(1):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait((waiting,))
        assert waiting.cancelled()
        assert len(turns) == 1
    assert len(turns) == 0


async def test_who_comes_while_others_wait_comes_after_them() -> None:
    """The key is not forgotten between its holder's leaving and the waiter's entering."""
    turns: Turns[int] = Turns()
    inside = 0

    async def enter() -> None:
        nonlocal inside
        async with turns.of(1):
            inside += 1
            assert inside == 1, "two at one time"
            await asyncio.sleep(0)
            inside -= 1

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            for _ in range(4):
                group.create_task(enter())
            await asyncio.sleep(0)
    assert len(turns) == 0
