"""Pages change hands between real processes; whoever dies when, no two processes write the same page."""

import asyncio
import socket
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtransfer.shm.adoption import AdoptablePool
from kvtransfer.shm.adoption_link import AdoptionLink, Kind, adopt, ask_outcome, prepare, serve_one
from kvtransfer.shm.page_table import ExchangeState, Frames, PageTable, SegmentId, mappings_of
from tandem.errors import ProtocolError, TransferError, TransferFault
from tandem.ids import BlockId
from tests.kvtransfer.adopting_process import fill
from tests.kvtransfer.pair import blocks

ROOT = Path(__file__).resolve().parents[2]
NUM_BLOCKS = 8
BLOCK_BYTES = 8192
OURS, THEIRS = 0xAA, 0xBB


@asynccontextmanager
async def giver(dies_at: str = "-") -> AsyncIterator[tuple[socket.socket, asyncio.subprocess.Process]]:
    """A giving process, and our end of the socket to it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.kvtransfer.adopting_process", str(theirs.fileno())),
            *(str(NUM_BLOCKS), str(BLOCK_BYTES), str(THEIRS), dies_at),
            cwd=ROOT,
            pass_fds=(theirs.fileno(),),
            stdout=asyncio.subprocess.PIPE,
        )
        theirs.close()
        try:
            yield ours, process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def marks(pool: AdoptablePool) -> list[tuple[int, int]]:
    """What the blocks hold: whose they were and their number then; the end must agree with the beginning."""
    views = [pool.view(BlockId(block)) for block in range(pool.num_blocks)]
    assert all(bytes(view[:2]) == bytes(view[-2:]) for view in views)
    return [(view[0], view[1]) for view in views]


def own_pool() -> AdoptablePool:
    """A pool with our marks."""
    pool = AdoptablePool(NUM_BLOCKS, BLOCK_BYTES)
    fill(pool, OURS)
    return pool


async def test_blocks_change_places_between_two_processes() -> None:
    async with giver() as (connection, process):
        with own_pool() as pool:
            link = AdoptionLink(connection, pool, 20.0)
            given_blocks, targets = blocks(2, 3, 4, 7), blocks(0, 1, 6, 5)
            adopt(link, pool, prepare(link, pool, 1, given_blocks, targets))
            held = marks(pool)
            assert [held[target] for target in targets] == [(THEIRS, block) for block in given_blocks]
            assert [held[block] for block in (2, 3, 4, 7)] == [(OURS, block) for block in (2, 3, 4, 7)]
            # What was adopted is writable and goes on to be exchanged.
            pool.view(BlockId(0))[:2] = pool.view(BlockId(0))[-2:] = bytes((OURS, 99))
            adopt(link, pool, prepare(link, pool, 2, blocks(0), blocks(0)))
            assert marks(pool)[0] == (THEIRS, 0)
        link.close()
        assert process.stdout is not None
        held_there = (await asyncio.wait_for(process.stdout.readline(), 20)).decode().split()
        expected = [
            (OURS, 99),
            (THEIRS, 1),
            (OURS, 0),
            (OURS, 1),
            (OURS, 6),
            (THEIRS, 5),
            (THEIRS, 6),
            (OURS, 5),
        ]
        assert held_there == [bytes(mark).hex() for mark in expected]


@pytest.mark.parametrize("dies_at", ["GRANT", "SETTLED"])
async def test_giver_that_is_killed_leaves_us_our_own_pages(dies_at: str) -> None:
    """Also when it had settled and only could not say so any more: nobody maps our pages but us."""
    async with giver(dies_at) as (connection, process):
        with own_pool() as pool:
            link = AdoptionLink(connection, pool, 20.0)
            with pytest.raises(TransferError) as caught:
                adopt(link, pool, prepare(link, pool, 1, blocks(1, 2), blocks(3, 4)))
            assert caught.value.fault is TransferFault.DISCONNECTED
            assert await process.wait() == -9
            assert marks(pool) == [(OURS, block) for block in range(NUM_BLOCKS)]
            assert not any(pool.table.in_exchange(BlockId(block)) for block in range(NUM_BLOCKS))


async def test_adopted_pages_outlive_their_giver() -> None:
    async with giver() as (connection, process):
        with own_pool() as pool:
            link = AdoptionLink(connection, pool, 20.0)
            adopt(link, pool, prepare(link, pool, 1, blocks(1, 2), blocks(3, 4)))
            process.kill()
            await process.wait()
            assert marks(pool)[3:5] == [(THEIRS, 1), (THEIRS, 2)]
            pool.view(BlockId(3))[:] = bytes(BLOCK_BYTES)


@pytest.mark.parametrize("settled", [False, True])
async def test_taker_that_goes_away_leaves_the_giver_a_whole_pool(settled: bool) -> None:
    async with giver() as (connection, process):
        pool = own_pool()
        link = AdoptionLink(connection, pool, 20.0)
        prepared = prepare(link, pool, 1, blocks(1, 2), blocks(3, 4))
        if settled:
            adopt(link, pool, prepared)
        # What a killed process does in this order: its memory goes, then its sockets.
        pool.close()
        link.close()
        assert process.stdout is not None
        held = (await asyncio.wait_for(process.stdout.readline(), 20)).decode().split()
        middle = [(OURS, 3), (OURS, 4)] if settled else [(THEIRS, 1), (THEIRS, 2)]
        expected = [(THEIRS, 0), *middle, *((THEIRS, block) for block in range(3, NUM_BLOCKS))]
        assert held == [bytes(mark).hex() for mark in expected]


def test_silent_giver_leaves_the_blocks_out_of_use_until_it_says() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, own_pool() as taking, own_pool() as giving:
        with pytest.raises(TransferError) as caught:
            prepare(AdoptionLink(ours, taking, 0.05), taking, 1, blocks(1), blocks(2))
        assert caught.value.fault is TransferFault.TIMEOUT
        assert taking.table.in_exchange(BlockId(2))
        with pytest.raises(ProtocolError):
            taking.begin(2, blocks(2))
        patient = AdoptionLink(ours, taking, 20.0)
        other = AdoptionLink(theirs, giving, 20.0)
        serving = threading.Thread(target=lambda: [serve_one(other, giving) for _ in range(2)])
        serving.start()
        assert ask_outcome(patient, taking, 1) is ExchangeState.CANCELLED
        serving.join()
        assert not taking.table.in_exchange(BlockId(2))
        assert not giving.table.in_exchange(BlockId(1))


def test_late_answer_is_not_taken_for_that_to_the_next_exchange() -> None:
    """Its frames lie behind other blocks of the giver: two pools would write the same pages."""
    ours, theirs = socket.socketpair()
    with ours, theirs, own_pool() as taking, own_pool() as giving:
        fill(giving, THEIRS)
        other = AdoptionLink(theirs, giving, 20.0)
        with pytest.raises(TransferError):
            prepare(AdoptionLink(ours, taking, 0.05), taking, 1, blocks(1), blocks(2))
        serve_one(other, giving)
        link = AdoptionLink(ours, taking, 20.0)
        serving = threading.Thread(target=lambda: [serve_one(other, giving) for _ in range(3)])
        serving.start()
        adopt(link, taking, prepare(link, taking, 2, blocks(5), blocks(6)))
        assert marks(taking)[6] == (THEIRS, 5)
        assert marks(giving)[5] == (OURS, 6)
        assert ask_outcome(link, taking, 1) is ExchangeState.CANCELLED
        serving.join()
        assert marks(taking)[2] == (OURS, 2)


def test_lost_answer_to_a_commit_is_asked_for() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, own_pool() as taking, own_pool() as giving:
        link, other = AdoptionLink(ours, taking, 20.0), AdoptionLink(theirs, giving, 20.0)
        giving.view(BlockId(1))[:2] = giving.view(BlockId(1))[-2:] = bytes((THEIRS, 1))
        serving = threading.Thread(target=lambda: [serve_one(other, giving) for _ in range(3)])
        serving.start()
        prepared = prepare(link, taking, 1, blocks(1), blocks(2))
        link.send(Kind.COMMIT, 1, np.concatenate((prepared.offered.segments, prepared.offered.indices)))
        assert ask_outcome(link, taking, 1) is ExchangeState.SETTLED
        serving.join()
        assert marks(taking)[2] == (THEIRS, 1)
        assert marks(giving)[1] == (OURS, 2)


def test_refused_exchange_changes_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, own_pool() as taking, own_pool() as giving:
        link, other = AdoptionLink(ours, taking, 20.0), AdoptionLink(theirs, giving, 20.0)
        giving.begin(7, blocks(1))
        serving = threading.Thread(target=lambda: [serve_one(other, giving) for _ in range(2)])
        serving.start()
        for given_blocks in (blocks(1), blocks(NUM_BLOCKS)):
            with pytest.raises(TransferError) as caught:
                prepare(link, taking, given_blocks[0], given_blocks, blocks(2))
            assert caught.value.fault is TransferFault.REFUSED
        serving.join()
        assert not taking.table.in_exchange(BlockId(2))


def test_blocks_that_are_not_whole_pages_are_refused() -> None:
    with pytest.raises(TransferError) as caught:
        AdoptablePool(4, 1000)
    assert caught.value.fault is TransferFault.UNSUPPORTED


def test_frames_outside_of_known_memory_are_refused_before_anything_changes() -> None:
    with own_pool() as pool:
        pool.begin(1, blocks(1))
        strange = np.array([12345], dtype=np.int64)
        with pytest.raises(TransferError) as caught:
            pool.settle(1, Frames(strange, np.array([0], dtype=np.int64)))
        assert caught.value.fault is TransferFault.UNSUPPORTED
        own = np.array([pool.segment], dtype=np.int64)
        with pytest.raises(TransferError) as caught:
            pool.settle(1, Frames(own, np.array([NUM_BLOCKS], dtype=np.int64)))
        assert caught.value.fault is TransferFault.LENGTH
        pool.cancel(1)
        assert marks(pool) == [(OURS, block) for block in range(NUM_BLOCKS)]


def test_runs_take_one_mapping_each() -> None:
    table = PageTable(SegmentId(5), 8)
    chosen = np.array([1, 2, 3, 6, 7, 4], dtype=np.int64)
    found = mappings_of(chosen, table.frames_of(blocks(4, 5, 6, 7, 3, 2)))
    assert [(run.block, run.index, run.count) for run in found] == [
        (1, 4, 3),
        (6, 7, 1),
        (7, 3, 1),
        (4, 2, 1),
    ]


class Pools(RuleBasedStateMachine):
    """Three pools that exchange blocks while they die and live anew; `tables` are those that live."""

    def __init__(self) -> None:
        super().__init__()
        self.segments = 0
        self.number = 0
        self.tables = {name: self.fresh() for name in range(3)}

    def fresh(self) -> PageTable:
        """A new life: new memory."""
        self.segments += 1
        return PageTable(SegmentId(self.segments), 5)

    @rule(
        taker=st.integers(0, 2),
        step=st.integers(1, 2),
        given_blocks=st.permutations(range(5)),
        taken_blocks=st.permutations(range(5)),
        count=st.integers(1, 5),
        end=st.sampled_from(["both", "cancel", "giver dies before", "giver dies after", "taker dies"]),
    )
    def exchange(
        self, taker: int, step: int, given_blocks: list[int], taken_blocks: list[int], count: int, end: str
    ) -> None:
        """One exchange, in the order in which adoption_link.py does it."""
        giver = (taker + step) % 3
        self.number += 1
        taking, giving = self.tables[taker], self.tables[giver]
        offered = taking.begin(self.number, blocks(*taken_blocks[:count]))
        granted = giving.begin(self.number, blocks(*given_blocks[:count]))
        if end in ("both", "giver dies after", "taker dies"):
            giving.settle(self.number, offered)
        if end == "both":
            taking.settle(self.number, granted)
        elif end == "cancel":
            giving.cancel(self.number)
            taking.cancel(self.number)
        elif end == "taker dies":
            self.tables[taker] = self.fresh()
        else:
            taking.cancel(self.number)
            self.tables[giver] = self.fresh()

    @invariant()
    def no_frame_has_two_owners(self) -> None:
        """Nor does a pool lose or gain any."""
        frames = [table.frames_of(blocks(*range(5))) for table in self.tables.values()]
        held = [pair for part in frames for pair in zip(part.segments, part.indices, strict=True)]
        assert len(set(held)) == len(held) == 15


TestPools = Pools.TestCase
