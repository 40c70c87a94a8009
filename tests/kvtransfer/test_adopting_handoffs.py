"""Hand-offs between pools in one arena: blocks change owners with the commit, none is lost or had twice."""

import asyncio
import random
import sys
import time
from pathlib import Path

import pytest

from kvtransfer.contract import (
    BlockMemory,
    BlockRange,
    KvReady,
    PeerId,
    SinkTransport,
    SourceTransport,
    Transfer,
)
from kvtransfer.faults import Fault, FaultSchedule, FaultySink, FaultySource
from kvtransfer.handoffs.offers import FrameExchange, PullAsk
from kvtransfer.handoffs.pairing import Introduction
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.host import host_id
from kvtransfer.shm.adopt import AdoptAddress, AdoptSource
from kvtransfer.tcp import framing
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId
from tandem.worker import Role
from tests.kvtransfer.arena_pair import ArenaPair, arena_pair
from tests.kvtransfer.bad_peers import say
from tests.kvtransfer.pair import config, eventually, key, outcome_of, record

BOTH = config("adopt", "shm")
COUNT = 6
ROOT = Path(__file__).resolve().parents[2]


async def test_adopted_blocks_hold_the_kv_where_it_was_computed() -> None:
    async with arena_pair(BOTH) as pair:
        expected = pair.read_prompt(key("a"), COUNT, 1)
        given = pair.legs.tables[key("a").leg_id]
        pair.source.offer(key("a"), given)
        held, report = await pair.pull(key("a"), BlockRange(0, COUNT))
        assert (held, report.transport) == (given, "adopt")
        assert pair.sink_pool.read(held) == expected
        assert pair.legs.released == [(key("a"), ReleaseReason.COMMITTED)]
        await pair.settled(held)


async def test_blocks_go_back_and_forth_for_ever() -> None:
    async with arena_pair(BOTH, num_blocks=8) as pair:
        for turn in range(20):
            name = key(f"leg-{turn}")
            expected = pair.read_prompt(name, COUNT, turn)
            pair.source.offer(name, pair.legs.tables[name.leg_id])
            held, report = await pair.pull(name, BlockRange(0, COUNT))
            assert (pair.sink_pool.read(held), report.transport) == (expected, "adopt")
            pair.sink_pool.fill(held, 1000 + turn)
            pair.sink_pool.pool.release(held)
            await pair.settled()


async def test_only_what_the_sink_wants_changes_owners() -> None:
    async with arena_pair(BOTH) as pair:
        expected = pair.read_prompt(key("a"), COUNT, 1)
        given = pair.legs.tables[key("a").leg_id]
        pair.source.offer(key("a"), given)
        held, _ = await pair.pull(key("a"), BlockRange(2, COUNT - 2))
        assert held == given[2:]
        assert pair.sink_pool.read(held) == expected[2:]
        await pair.settled(held)
        assert {*given[:2]} <= {*pair.source_pool.memory.owned()}


async def test_growing_offer_is_adopted_when_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.handoffs.pieces.MIN_PIECE_BYTES", 1)
    async with arena_pair(BOTH) as pair:
        expected = pair.read_prompt(key("a"), COUNT, 1)
        given = pair.legs.tables[key("a").leg_id]
        pair.source.offer(key("a"), given, KvReady(0, 0))
        pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(0, COUNT)))
        for ready in (KvReady(2, 0), KvReady(4, 0), KvReady(4, 2), KvReady(6, 4)):
            await eventually(lambda: pair.source.counts().in_flight == 1, 5.0)
            assert not pair.legs.released
            pair.source.advance(key("a"), ready)
        held, report = await pulling
        assert report.transport == "adopt"
        assert (held, pair.sink_pool.read(held)) == (given, expected)
        await pair.settled(held)


async def test_blocks_that_a_step_touches_are_given_when_it_has_ended() -> None:
    async with arena_pair(BOTH) as pair:
        pair.read_prompt(key("a"), COUNT, 1)
        pair.source.offer(key("a"), pair.legs.tables[key("a").leg_id])
        pair.legs.busy = True
        pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(0, COUNT)))
        await eventually(lambda: pair.legs.refused > 0, 5.0)
        assert not pulling.done()
        assert not pair.legs.released
        pair.legs.busy = False
        held, report = await pulling
        assert report.transport == "adopt"
        await pair.settled(held)


async def test_pull_that_is_cancelled_before_the_commit_leaves_both_sides_their_blocks() -> None:
    async with arena_pair(BOTH) as pair:
        before = pair.sink_pool.memory.owned()
        pair.read_prompt(key("a"), COUNT, 1)
        pair.source.offer(key("a"), pair.legs.tables[key("a").leg_id])
        pair.legs.busy = True
        pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(0, COUNT)))
        await eventually(lambda: pair.legs.refused > 0, 5.0)
        pulling.cancel()
        assert isinstance(await outcome_of(pulling), asyncio.CancelledError)
        await pair.settled()
        assert pair.sink_pool.memory.owned() == before
        assert pair.legs.released[0][1] is ReleaseReason.ABORTED_BY_SINK


async def test_pull_that_ends_while_the_source_gives_has_the_blocks_that_were_given() -> None:
    """The answer is lost: the sink can't use the KV, and its pool is whole all the same."""
    async with arena_pair(BOTH) as pair:
        pair.read_prompt(key("a"), COUNT, 1)
        given = pair.legs.tables[key("a").leg_id]
        pair.source.offer(key("a"), given)
        pulling: asyncio.Task[object] = asyncio.create_task(pair.pull(key("a"), BlockRange(0, COUNT)))
        pair.legs.before_giving = pulling.cancel
        assert isinstance(await outcome_of(pulling), asyncio.CancelledError)
        await pair.settled()
        assert {*given} <= {*pair.sink_pool.memory.owned()}


async def test_pool_that_does_not_adopt_copies() -> None:
    async with arena_pair(BOTH) as pair:
        expected = pair.read_prompt(key("a"), COUNT, 1)
        pair.source.offer(key("a"), pair.legs.tables[key("a").leg_id])
        targets = pair.sink_pool.pool.allocate(COUNT)
        wanted = BlockRange(0, COUNT)
        report = await pair.sink.pull(key("a"), pair.source_record, wanted, targets, 0, 20.0)
        assert report.transport == "shm"
        assert pair.sink_pool.read(targets) == expected
        await pair.settled(targets)


@pytest.mark.parametrize(("transport", "first", "count"), [("shm", 0, 2), ("adopt", 5, 2), ("adopt", 0, 7)])
async def test_exchange_that_makes_no_sense_is_refused_and_changes_nothing(
    transport: str, first: int, count: int
) -> None:
    """For blocks that were granted to be copied, and for more than there are."""
    async with arena_pair(BOTH) as pair:
        sink = PeerId.of(record("decode-0", Role.DECODE))
        pair.source.connect(Introduction(sink, "d", ("adopt", "shm"), host_id(), ("xxh3_64",)))
        pair.read_prompt(key("a"), COUNT, 1)
        pair.source.offer(key("a"), pair.legs.tables[key("a").leg_id])
        transfer = Transfer(key("a"), 1, BlockRange(0, COUNT))
        await pair.source.pull(PullAsk(sink, "d", transport, transfer))
        arena = pair.sink_pool.memory
        frames = arena.blocks[:count]
        arena.offer(pair.source_pool.memory.member, frames)
        with pytest.raises(TransferError) as caught:
            exchange = FrameExchange(arena.member, first, frames)
            await pair.source.commit(key("a"), sink, 1, {}, exchange)
        assert caught.value.fault is TransferFault.LENGTH
        assert arena.settle(pair.source_pool.memory.member, frames, frames) == ()
        pair.source.abort(key("a"), sink)
        await pair.settled()


async def test_sink_that_speaks_on_a_link_of_adoption_loses_it_and_is_counted() -> None:
    async with arena_pair(BOTH) as pair:
        sink, ticket = PeerId.of(record("decode-0", Role.DECODE)), bytes(32)
        lost, refused = list[PeerId](), list[TransferFault]()
        source = AdoptSource(pair.source_pool.memory, BOTH)
        await source.start(lost.append, refused.append)
        try:
            address = AdoptAddress.decode(source.endpoint(sink, ticket) or "")
            heard = await say(b"\0" + address.link.encode(), framing.encode_greeting(ticket) + b"?", False)
            framing.check_welcome(heard)
            assert (lost, refused) == ([sink], [TransferFault.UNSUPPORTED])
        finally:
            await source.close()


async def test_sink_that_is_killed_leaves_the_source_a_whole_pool_within_two_seconds() -> None:
    """It has its blocks on offer when it dies; they are not taken, for nobody wants what they were for."""
    async with arena_pair(config("adopt", "shm", regrasp_s=0.2)) as pair:
        pair.read_prompt(key("a"), COUNT, 1)
        pair.source.offer(key("a"), pair.legs.tables[key("a").leg_id])
        pair.legs.busy = True
        folder = Path(pair.source_pool.memory._file.path)
        dying = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.kvtransfer.adopting_process"),
            *(pair.source_record.address, str(folder), str(COUNT), str(pair.source_pool.block_bytes)),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        assert dying.stdout is not None
        assert await asyncio.wait_for(dying.stdout.readline(), 50) == b"offered\n"
        dying.kill()
        await dying.wait()
        began_s = time.monotonic()
        await pair.settled()
        assert time.monotonic() - began_s < 2.0
        assert pair.legs.released == [(key("a"), ReleaseReason.PEER_LOST)]


SCHEDULES = 60
WEIGHTS = {Fault.NONE: 4.0, Fault.DELAY: 1.0, Fault.DROP: 0.5, Fault.TRUNCATE: 1.0, Fault.DISCONNECT: 1.0}


async def hand_over(pair: ArenaPair, leg: int, chance: random.Random) -> tuple[BlockId, ...]:
    """One hand-off, which may grow and may be given up by either side; the sink's blocks if it arrived."""
    name, count = key(f"leg-{leg}"), chance.randint(1, 8)
    expected = pair.read_prompt(name, count, leg)
    states = [KvReady(0, 0), KvReady(count // 2, 0), KvReady(count // 2, 2), KvReady(count, 4)]
    pair.source.offer(name, pair.legs.tables[name.leg_id], states[0])
    began_s = time.monotonic()
    pulling = asyncio.create_task(pair.pull(name, BlockRange(0, count), remaining_s=2.0))
    for ready in states[1:]:
        await asyncio.sleep(chance.random() * 0.01)
        pair.source.advance(name, ready)
    end = chance.random()
    if end < 0.2:
        await asyncio.sleep(chance.random() * 0.02)
        pulling.cancel() if end < 0.1 else pair.source.withdraw(name.leg_id)
    try:
        held, _ = await pulling
    except (TransferError, asyncio.CancelledError):
        return ()
    finally:
        assert time.monotonic() - began_s < 2.5
    assert pair.sink_pool.read(held) == expected
    return held


async def run_schedule(seed: int) -> None:
    """Twenty hand-offs, four at a time, over transports that fail by the seed."""
    chance = random.Random(seed)

    def wrap_sink(inner: SinkTransport, pool: BlockMemory) -> SinkTransport:
        return FaultySink(inner, pool, FaultSchedule(chance.randrange(1 << 30), WEIGHTS, delay_s=0.01))

    def wrap_source(inner: SourceTransport) -> SourceTransport:
        return FaultySource(inner, FaultSchedule(chance.randrange(1 << 30), WEIGHTS, delay_s=0.01))

    # An abort may be lost: what nobody ever pulled comes back when its park time is over.
    times = {"lease_s": 0.3, "connect_timeout_s": 0.3, "fence_margin_s": 0.05, "regrasp_s": 0.1}
    settings = config("adopt", "shm", **times, stall_s=0.1, backoff_s=0.02, park_s=1.0)
    async with arena_pair(settings, 40, 4096, wrap_sink, wrap_source) as pair:
        for first in range(0, 20, 4):
            async with asyncio.TaskGroup() as group:
                ended = [
                    group.create_task(hand_over(pair, first + leg, chance), name=f"seed {seed}")
                    for leg in range(4)
                ]
            for task in ended:
                pair.sink_pool.pool.release(task.result())
            await pair.settled()


@pytest.mark.parametrize("first", range(0, SCHEDULES, 10))
async def test_faults_cost_time_but_never_bytes_or_blocks(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.handoffs.pieces.MIN_PIECE_BYTES", 4096)
    async with asyncio.TaskGroup() as group:
        for seed in range(first, first + 10):
            group.create_task(run_schedule(seed), name=f"seed {seed}")
