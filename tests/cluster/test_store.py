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
from cluster.store import (
    Controlled,
    Desired,
    Failures,
    RegisteredWorker,
    Store,
    StoreAddress,
    StoreUnavailable,
)
from planner.control.load_window import RolePlacement
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


async def test_desired_placement_is_kept_under_a_new_version(store: Store) -> None:
    assert await store.desired() is None
    await store.set_desired(RolePlacement(1, 2))
    assert await store.desired() == Desired(1, RolePlacement(1, 2))
    await store.set_desired(RolePlacement(2, 1))
    assert await store.desired() == Desired(2, RolePlacement(2, 1))


async def test_what_is_wanted_is_replaced_only_by_who_saw_it(store: Store) -> None:
    assert not await store.set_desired(RolePlacement(3, 3), expected_version=7)
    assert await store.set_desired(RolePlacement(1, 2), expected_version=0)
    assert not await store.set_desired(RolePlacement(3, 3), expected_version=0)
    assert await store.set_desired(RolePlacement(2, 1), expected_version=1)
    assert await store.desired() == Desired(2, RolePlacement(2, 1))


async def test_one_controller_leads_until_its_lease_ends_or_it_resigns(store: Store) -> None:
    assert await store.lead("one", LEASE_S)
    assert await store.lead("one", LEASE_S)
    assert not await store.lead("two", LEASE_S)
    await store.resign("two")
    assert not await store.lead("two", LEASE_S)
    await eventually(lambda: store.lead("two", LEASE_S))
    assert not await store.lead("one", LEASE_S)
    await store.resign("two")
    assert await store.lead("one", LEASE_S)


async def test_only_the_leading_controller_writes_and_only_over_what_it_saw(store: Store) -> None:
    await store.set_desired(RolePlacement(1, 2))
    change = Desired(1, RolePlacement(2, 1))
    assert await store.control("one", b"memory", change) is Controlled.NOT_LEADING
    await store.lead("one", 60.0)
    assert await store.control("two", b"memory", change) is Controlled.NOT_LEADING
    stale = Desired(0, RolePlacement(3, 3))
    assert await store.control("one", b"memory", stale) is Controlled.CHANGED_MEANWHILE
    assert await store.controller_memory() is None
    assert await store.control("one", b"memory", change) is Controlled.DONE
    assert await store.desired() == Desired(2, RolePlacement(2, 1))
    assert await store.control("one", b"later", None) is Controlled.DONE
    assert await store.controller_memory() == b"later"
    assert await store.desired() == Desired(2, RolePlacement(2, 1))


async def test_a_new_beginning_makes_the_controller_forget(store: Store) -> None:
    await store.lead("one", 60.0)
    await store.control("one", b"memory", None)
    await store.set_desired(RolePlacement(1, 1))
    assert await store.controller_memory() is None


async def test_the_membership_shows_what_is_wanted(store: Store) -> None:
    await store.set_desired(RolePlacement(1, 2))
    membership = StoreMembership(store, LEASE_S)
    assert membership.desired() == {}
    async with aclosing(membership.watch()) as changes:
        await anext(changes)
    assert membership.desired() == {Role.PREFILL: 1, Role.DECODE: 2}


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
