"""Edge: the registry over a real Valkey server: leases, incarnations, its restarts, its password."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.embedded_store import EmbeddedStore, embedded_store
from cluster.membership import StoreMembership, Superseded, keep_registered, registered
from cluster.store import Failures, RegisteredWorker, Store, StoreAddress, StoreUnavailable
from tandem.errors import ConfigError
from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role, WorkerRecord
from tests.cluster.polling import eventually

LEASE_S = 0.6


def worker(name: str, incarnation: int = 1) -> RegisteredWorker:
    record = WorkerRecord(WorkerId(name), Incarnation(incarnation), Role.DECODE, "127.0.0.1:1", "digest")
    return RegisteredWorker(record, pid=os.getpid(), host="here")


def address_of(server: EmbeddedStore) -> StoreAddress:
    return StoreAddress(server.url, password=server.password)


@asynccontextmanager
async def connected(address: StoreAddress) -> AsyncIterator[Store]:
    store = Store(address)
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    async with embedded_store(tmp_path / "valkey.log") as running:
        yield running


@pytest.fixture
async def store(server: EmbeddedStore) -> AsyncIterator[Store]:
    async with connected(address_of(server)) as open_store:
        yield open_store


async def names(store: Store) -> list[str]:
    return [entry.record.worker_id for entry in (await store.living()).workers]


async def eventually_names(store: Store, expected: list[str]) -> None:
    async def shows_expected() -> bool:
        return await names(store) == expected

    await eventually(shows_expected)


async def collect(store: Store, snapshots: list[list[str]]) -> None:
    """Appends the ids of each snapshot that the membership yields."""
    async with aclosing(StoreMembership(store, LEASE_S).watch()) as changes:
        async for snapshot in changes:
            ids = [record.worker_id for record in snapshot]
            snapshots.append(list(ids))


async def seen(snapshots: list[list[str]], count: int) -> None:
    async def enough() -> bool:
        return len(snapshots) >= count

    await eventually(enough, 10)


async def test_registered_workers_are_shown_as_they_were_given(store: Store) -> None:
    await store.register(worker("b"), LEASE_S)
    await store.register(worker("a"), LEASE_S)
    assert (await store.living()).workers == (worker("a"), worker("b"))


async def test_worker_that_stops_renewing_is_gone_after_its_lease(store: Store) -> None:
    await store.register(worker("silent"), LEASE_S)
    renewing = asyncio.create_task(keep_registered(store, worker("alive"), LEASE_S))
    await eventually_names(store, ["alive"])
    await asyncio.sleep(LEASE_S)
    assert await names(store) == ["alive"]
    renewing.cancel()
    await eventually_names(store, [])


async def test_leaving_gives_the_lease_back_at_once(store: Store) -> None:
    async with registered(store, worker("a"), lease_s=60):
        await eventually_names(store, ["a"])
    assert await names(store) == []


async def test_incarnations_grow_also_when_the_registry_lost_its_data(
    server: EmbeddedStore, tmp_path: Path
) -> None:
    async with connected(address_of(server)) as store:
        first = await store.next_incarnation(WorkerId("a"))
        second = await store.next_incarnation(WorkerId("a"))
        os.kill(server.pid, signal.SIGKILL)
    async with (
        embedded_store(tmp_path / "again.log") as fresh,
        connected(address_of(fresh)) as store,
    ):
        third = await store.next_incarnation(WorkerId("a"))
    assert first < second < third


async def test_older_life_cannot_take_the_place_of_a_newer_one(store: Store) -> None:
    old = await store.next_incarnation(WorkerId("a"))
    new = await store.next_incarnation(WorkerId("a"))
    assert await store.register(worker("a", new), LEASE_S)
    with pytest.raises(Superseded):
        await keep_registered(store, worker("a", old), LEASE_S)
    await store.deregister(worker("a", old).record)
    assert (await store.living()).workers == (worker("a", new),)


async def test_wrong_password_is_the_operators_fault(server: EmbeddedStore) -> None:
    for password in (None, "wrong"):
        async with connected(replace(address_of(server), password=password)) as store:
            with pytest.raises(ConfigError, match="TANDEM_REDIS_PASSWORD"):
                await store.living()


def test_password_stands_in_no_argument_list_and_no_file(server: EmbeddedStore, tmp_path: Path) -> None:
    readable = [Path(f"/proc/{server.pid}/cmdline"), *tmp_path.iterdir()]
    assert len(readable) == 2
    assert not [path for path in readable if server.password.encode() in path.read_bytes()]
    assert server.password not in repr(address_of(server))


async def test_unreachable_registry_is_named_within_the_call_timeout() -> None:
    async with connected(StoreAddress("redis://127.0.0.1:1/0")) as store, asyncio.timeout(3):
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
            await store.living()


async def test_failures_add_up_until_the_worker_registers(store: Store) -> None:
    assert await store.failures() == {}
    await store.note_failure(WorkerId("a"), "no such model")
    await store.note_failure(WorkerId("a"), "port 1 is taken")
    await store.note_failure(WorkerId("b"), "x" * 10_000)
    failures = await store.failures()
    assert failures[WorkerId("a")] == Failures(2, "port 1 is taken")
    assert len(failures[WorkerId("b")].last_reason) < 5000
    await store.register(worker("a"), LEASE_S)
    assert set(await store.failures()) == {"b"}


async def test_desired_placement_is_kept(store: Store) -> None:
    assert await store.desired() == {}
    await store.set_desired({"prefill": 1, "decode": 2})
    assert await store.desired() == {"prefill": 1, "decode": 2}


async def test_watch_yields_every_change_and_nothing_else(store: Store) -> None:
    snapshots: list[list[str]] = []

    watching = asyncio.create_task(collect(store, snapshots))
    await seen(snapshots, 1)
    async with registered(store, worker("a"), LEASE_S):
        await seen(snapshots, 2)
        await asyncio.sleep(2 * LEASE_S)
    await seen(snapshots, 3)
    watching.cancel()
    assert snapshots == [[], ["a"], []]


async def test_restart_of_the_server_drops_nobody_and_needs_no_restart_of_anyone(tmp_path: Path) -> None:
    snapshots: list[list[str]] = []

    async with embedded_store(tmp_path / "first.log") as first:
        address = address_of(first)
        async with connected(address) as store:
            living = asyncio.create_task(keep_registered(store, worker("lives"), LEASE_S))
            dying = asyncio.create_task(keep_registered(store, worker("dies"), LEASE_S))
            await eventually_names(store, ["dies", "lives"])
            watching = asyncio.create_task(collect(store, snapshots))
            await asyncio.sleep(0.1)
            os.kill(first.pid, signal.SIGKILL)
            dying.cancel()
            await asyncio.sleep(2 * LEASE_S)
            assert snapshots == [["dies", "lives"]]
            async with embedded_store(tmp_path / "second.log", port=first.port, password=first.password):
                await seen(snapshots, 2)
                assert snapshots == [["dies", "lives"], ["lives"]]
                assert await names(store) == ["lives"]
            for task in (living, watching):
                task.cancel()
            await asyncio.gather(living, dying, watching, return_exceptions=True)
