"""Edge: controllers over a real registry: one acts, the next goes on, outages cost time and nothing else."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from cluster.controller.load_windows import RouterSample, WorkerSample
from cluster.controller.log_file import NoLog, open_log
from cluster.controller.loop import MOST_UNSETTLED, Brain, ControllerLoop, Senses, dry_run
from cluster.controller.metrics import ControllerMetrics
from cluster.embedded_store import EmbeddedStore, embedded_store
from cluster.store import Desired, Store, StoreAddress
from planner.control.controller import ControllerRules
from planner.control.load_window import RolePlacement
from planner.control.log import replay
from planner.control.role_capacity import Capacity
from tandem.errors import NotReady
from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role
from tests.cluster.polling import eventually

WINDOW_S = 60.0
LEASE_S = 0.6
RULES = ControllerRules(fewest=2, most=6, patience=2, dwell_s=180.0)
READING, WRITING = (1000, 10), (10, 1000)
START, WANTED = RolePlacement(1, 3), RolePlacement(3, 1)
"""Of a load of READING at 15 requests a second the first serves 10, the second 30."""


def by_lengths(lengths: tuple[tuple[int, int], ...]) -> Capacity:
    """A prefill worker reads 10,000 tokens a second, a decode worker writes 10,000."""
    prompt = sum(pair[0] for pair in lengths) / len(lengths)
    output = sum(pair[1] for pair in lengths) / len(lengths)
    return lambda one: min(10_000 * one.prefill / prompt, 10_000 * one.decode / output)


BRAIN = Brain(RULES, by_lengths, WINDOW_S)


async def at_once() -> None:
    """The router does not let anybody wait."""


@dataclass
class World:
    """A clock that tests move, and a router whose counters grow by what they say."""

    now_s: float = 1_000_000.0
    placement: RolePlacement = START
    offered: int = 0
    lengths: tuple[int, int] = READING
    answers: bool = True
    metrics: ControllerMetrics = field(default_factory=ControllerMetrics)
    before_answer: Callable[[], Awaitable[None]] = at_once

    def clock(self) -> float:
        return self.now_s

    async def read(self) -> tuple[RouterSample, ...]:
        await self.before_answer()
        if not self.answers:
            raise NotReady("No router tells its load.")
        counts = (self.offered, self.offered, self.offered)
        return (RouterSample("r", *counts, (self.lengths,), tuple(self._workers())),)

    def _workers(self) -> list[WorkerSample]:
        roles = [Role.PREFILL] * self.placement.prefill + [Role.DECODE] * self.placement.decode
        return [
            WorkerSample(WorkerId(f"w{number}"), Incarnation(1), role, 0.0, True)
            for number, role in enumerate(roles)
        ]

    def pass_window(self, rate_rps: float) -> None:
        """A window goes by in which requests come at this rate."""
        self.now_s += WINDOW_S
        self.offered += round(rate_rps * WINDOW_S)

    def senses(self) -> Senses:
        return Senses(self, NoLog(), self.metrics, self.clock)

    def shown(self, line: str) -> bool:
        return line in generate_latest(self.metrics.registry).decode()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    async with embedded_store(tmp_path / "valkey.log") as running:
        yield running


@asynccontextmanager
async def connected(server: EmbeddedStore) -> AsyncIterator[Store]:
    store = Store(StoreAddress(server.url, password=server.password))
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(server: EmbeddedStore) -> AsyncIterator[Store]:
    async with connected(server) as open_store:
        await open_store.set_desired(START)
        yield open_store


def loop_of(world: World, store: Store) -> ControllerLoop:
    return ControllerLoop(BRAIN, world.senses(), store, LEASE_S)


async def windows(world: World, *loops: ControllerLoop, count: int, rate_rps: float = 15.0) -> None:
    """So many windows end; every controller has its turn at each."""
    for _ in range(count):
        world.pass_window(rate_rps)
        for loop in loops:
            await loop.turn()


async def until_leading(loop: ControllerLoop) -> None:
    """The controller has its turns until it leads."""

    async def leads() -> bool:
        await loop.turn()
        return loop.leading

    await eventually(leads)


async def test_what_the_controller_wants_is_in_the_registry_under_a_new_version(store: Store) -> None:
    world = World()
    loop = loop_of(world, store)
    await loop.turn()
    await windows(world, loop, count=1)
    assert await store.desired() == Desired(1, START)
    await windows(world, loop, count=1)
    assert await store.desired() == Desired(2, WANTED)
    assert world.shown('tandem_controller_changes_total{action="flip_to_prefill"} 2.0')
    assert world.shown("tandem_controller_leading 1.0")


async def test_of_two_controllers_one_acts(store: Store) -> None:
    world = World()
    first, second = loop_of(world, store), loop_of(world, store)
    for loop in (first, second):
        await loop.turn()
    assert (first.leading, second.leading) == (True, False)
    await windows(world, first, second, count=4)
    assert await store.desired() == Desired(2, WANTED)
    assert world.shown('tandem_controller_decisions_total{verdict="short"} 1.0')


async def test_a_controller_that_is_killed_is_followed_by_one_that_goes_on(store: Store) -> None:
    world = World()
    killed, next_one = loop_of(world, store), loop_of(world, store)
    await killed.turn()
    await windows(world, killed, count=1)
    await until_leading(next_one)
    await windows(world, next_one, count=1)
    assert await store.desired() == Desired(2, WANTED)
    await killed.turn()
    assert not killed.leading


async def test_a_restarted_controller_dwells_and_does_not_flap(store: Store) -> None:
    world = World()
    await decided(world, store)
    world.placement = WANTED
    for _ in range(2):
        world.lengths = WRITING if world.lengths == READING else READING
        restarted = loop_of(world, store)
        await restarted.turn()
        await windows(world, restarted, count=1, rate_rps=15.0)
        await restarted.resign()
        assert await store.desired() == Desired(2, WANTED)
    assert world.shown('tandem_controller_decisions_total{verdict="dwelling"}')


async def decided(world: World, store: Store) -> None:
    """A controller wants 3 + 1, and ends."""
    loop = loop_of(world, store)
    await loop.turn()
    await windows(world, loop, count=2)
    await loop.resign()
    assert await store.desired() == Desired(2, WANTED)


async def test_a_decision_of_who_lost_the_lease_meanwhile_is_not_written(store: Store) -> None:
    world = World()
    paused = loop_of(world, store)
    await paused.turn()
    await windows(world, paused, count=1)
    leads: list[bool] = []

    async def lease_ends() -> None:
        await asyncio.sleep(1.5 * LEASE_S)
        leads.append(await store.lead("another", 60.0))

    world.before_answer = lease_ends
    await windows(world, paused, count=1)
    assert leads == [True]
    assert await store.desired() == Desired(1, START)
    assert not paused.leading


async def test_a_change_by_somebody_else_is_where_the_controller_goes_on_from(store: Store) -> None:
    world = World()
    loop = loop_of(world, store)
    await loop.turn()
    await windows(world, loop, count=2)
    assert await store.desired() == Desired(2, WANTED)
    world.placement = START
    assert await store.set_desired(START, expected_version=2)
    await windows(world, loop, count=2)
    assert await store.desired() == Desired(3, START)
    await windows(world, loop, count=2)
    assert await store.desired() == Desired(4, WANTED)


async def test_nothing_is_decided_while_the_cluster_is_not_what_is_wanted(store: Store) -> None:
    world = World()
    loop = loop_of(world, store)
    await loop.turn()
    world.placement = RolePlacement(1, 2)
    await windows(world, loop, count=MOST_UNSETTLED)
    assert world.shown(f"tandem_controller_skipped_windows_total {MOST_UNSETTLED}.0")
    assert await store.desired() == Desired(1, START)
    await windows(world, loop, count=2)
    assert await store.desired() == Desired(2, RolePlacement(2, 1))


async def test_a_window_without_load_is_left_out(store: Store) -> None:
    world = World(answers=False)
    loop = loop_of(world, store)
    await loop.turn()
    assert not loop.leading
    world.answers = True
    await loop.turn()
    await windows(world, loop, count=1)
    world.answers = False
    await windows(world, loop, count=1)
    world.answers = True
    await windows(world, loop, count=1)
    assert await store.desired() == Desired(2, WANTED)
    assert world.shown("tandem_controller_skipped_windows_total 1.0")


async def test_an_outage_of_the_registry_costs_windows_and_the_controller_acts_later(
    server: EmbeddedStore, store: Store
) -> None:
    world = World()
    loop = loop_of(world, store)
    await loop.turn()
    await windows(world, loop, count=1)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        await windows(world, loop, count=1)
        assert not loop.leading
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await until_leading(loop)
    await windows(world, loop, count=1)
    assert await store.desired() == Desired(2, WANTED)


async def test_a_clock_that_was_put_back_does_not_stop_the_controller(store: Store) -> None:
    world = World()
    loop = loop_of(world, store)
    await loop.turn()
    world.now_s -= 10 * WINDOW_S
    await loop.turn()
    await windows(world, loop, count=2)
    assert await store.desired() == Desired(2, WANTED)


async def test_memory_that_nobody_can_read_is_forgotten(store: Store) -> None:
    await store.lead("another version", LEASE_S)
    await store.control("another version", b'{"desired": 7}', None)
    await store.resign("another version")
    world = World()
    loop = loop_of(world, store)
    await loop.turn()
    assert loop.leading


def replayed(folder: Path) -> list[list[bool]]:
    """Of every file of a log, which decisions are made anew."""
    files = [path.read_bytes().splitlines(keepends=True) for path in folder.glob("controller.jsonl*")]
    return [[one.equal for one in replay(lines, by_lengths)] for lines in files]


async def test_the_log_of_controllers_that_followed_each_other_is_replayed_byte_for_byte(
    store: Store, tmp_path: Path
) -> None:
    world, path = World(), tmp_path / "controller.jsonl"
    for _ in range(3):
        with open_log(path, 1 << 20, RULES) as notes:
            loop = ControllerLoop(BRAIN, Senses(world, notes, world.metrics, world.clock), store, LEASE_S)
            await loop.turn()
            await windows(world, loop, count=2)
            await loop.resign()
    assert await store.desired() == Desired(2, WANTED)
    assert replayed(tmp_path) == [[True, True]]


async def test_every_file_of_a_log_that_was_set_aside_is_replayed_by_itself(
    store: Store, tmp_path: Path
) -> None:
    world, path = World(), tmp_path / "controller.jsonl"
    with open_log(path, 2000, RULES) as notes:
        loop = ControllerLoop(BRAIN, Senses(world, notes, world.metrics, world.clock), store, LEASE_S)
        await loop.turn()
        await windows(world, loop, count=12, rate_rps=5.0)
    files = replayed(tmp_path)
    assert len(files) > 2
    assert all(files)
    assert all(equal for file in files for equal in file)


async def test_a_dry_run_says_what_would_change_once_and_writes_nothing(store: Store) -> None:
    world, said = World(), list[str]()
    brain = Brain(RULES, by_lengths, 0.02)

    def say(line: str) -> None:
        said.append(line)
        world.offered += 1000

    running = asyncio.create_task(dry_run(brain, world, say))
    async with asyncio.timeout(10.0):
        while len(said) < 6:
            world.offered += 10
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert sum("flip decode to prefill" in line for line in said) == 1
    assert said[0].startswith("1 prefill + 3 decode")
    assert await store.desired() == Desired(1, START)
    assert await store.controller_memory() is None
