"""Hand-offs that begin while their prefill runs: pieces over real transports, as they get ready."""

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

import kvtransfer.handoffs.client
import kvtransfer.handoffs.source
from kvtransfer.checksums import XXH3
from kvtransfer.contract import (
    BlockMemory,
    BlockRange,
    KvReady,
    OnLanded,
    PeerId,
    PullGrant,
    PullReport,
    SinkTransport,
    Transfer,
)
from kvtransfer.faults import Fault, FaultSchedule, FaultySink
from kvtransfer.handoffs.offers import PullAnswer, PullAsk
from kvtransfer.handoffs.pairing import Introduction
from kvtransfer.handoffs.wire import grant_from_wire
from kvtransfer.handoffs.words import HandoffState, ReleaseReason
from tandem.errors import ProtocolError, TransferError, TransferFault
from tandem.ids import BlockId, Incarnation, WorkerId
from tandem.v1.worker_pb2 import PullResponse
from tests.kvtransfer.pair import Pair, blocks, config, connected_pair, eventually, key, outcome_of

MIB = 1 << 20
LAYERS = 4
GIVEN = blocks(7, 0, 3, 5, 1, 6)
TARGETS = blocks(2, 4, 0, 1, 7, 3)
ALL = KvReady(len(GIVEN), LAYERS)


@pytest.fixture(params=["shm", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    """Name of the transport under test."""
    name = request.param
    assert isinstance(name, str)
    return name


class BreakingSink(FaultySink):
    """Lets so many transfers pass, then breaks every one; `grants` are those that passed."""

    def __init__(self, inner: SinkTransport, pool: BlockMemory, passing: int) -> None:
        super().__init__(inner, pool, FaultSchedule(1, {Fault.NONE: 1.0}))
        self.passing = passing
        self.grants: list[PullGrant] = []

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """As the base does, or fails at once."""
        if len(self.grants) >= self.passing:
            raise TransferError(TransferFault.DISCONNECTED, "The test broke the link.")
        self.grants.append(grant)
        return await super().receive(source, grant, target, on_landed)


def prefill(pool: BlockMemory, ready: KvReady, seed: int) -> None:
    """Writes what a state of the offer promises; the rest of its blocks stays noise of another seed."""
    leg = random.Random(seed).randbytes(len(GIVEN) * pool.block_bytes)
    for index, block in enumerate(GIVEN):
        end = pool.block_bytes if index < ready.blocks else ready.layers * pool.layer_bytes
        start = index * pool.block_bytes
        pool.view(block)[:end] = leg[start : start + end]


def pull(pair: Pair, leg: str, remaining_s: float = 20.0) -> asyncio.Task[PullReport]:
    """Pulls all of a leg in a task."""
    whole = BlockRange(0, len(GIVEN))
    return asyncio.create_task(pair.pull(key(leg), whole, TARGETS, remaining_s))


def questions(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> list[PullAsk]:
    """What the sink asks the source from now on, as it asks it; it asks often whether more is ready."""
    monkeypatch.setattr("kvtransfer.handoffs.pulling.WAIT_S", 0.01)
    asked: list[PullAsk] = []
    answer = pair.source.pull

    async def heard(ask: PullAsk) -> PullAnswer:
        asked.append(ask)
        return await answer(ask)

    monkeypatch.setattr(pair.source, "pull", heard)
    return asked


async def grow(pair: Pair, leg: str, ready: KvReady, pieces: Callable[[], int], count: int) -> None:
    """Makes more ready and waits until so many pieces have landed."""
    prefill(pair.source_pool, ready, 9)
    pair.source.advance(key(leg), ready)
    await eventually(lambda: pieces() >= count, within_s=5.0)


async def test_pieces_land_while_the_prefill_runs(transport: str) -> None:
    passing: list[BreakingSink] = []

    def wrap(inner: SinkTransport, pool: BlockMemory) -> SinkTransport:
        passing.append(BreakingSink(inner, pool, 99))
        return passing[0]

    async with connected_pair(config(transport), 8, MIB, wrap) as pair:
        pair.source.offer(key("a"), GIVEN, KvReady(0, 0))
        pulling = pull(pair, "a")
        landed = passing[0].grants
        for count, ready in enumerate((KvReady(2, 0), KvReady(3, 0), KvReady(3, 2)), 1):
            await grow(pair, "a", ready, lambda: len(landed), count)
        assert not pulling.done()
        prefill(pair.source_pool, ALL, 9)
        pair.source.advance(key("a"), ALL)
        report = await pulling
        assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(GIVEN)
        ranges = [grant.transfer.block_range for grant in landed]
        assert ranges[:2] == [BlockRange(0, 2), BlockRange(2, 1)]
        assert ranges[2:] == [BlockRange(3, 3, 0, 2), BlockRange(3, 3, 2, 2)]
        assert (report.pieces, report.moved_bytes) == (4, len(GIVEN) * MIB)
        await pair.wait_released(1, within_s=10.0)
        assert pair.released == [(key("a"), ReleaseReason.COMMITTED)]


async def test_growing_offer_outlives_lease_and_park_time_while_a_sink_waits(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's clock is put forward with every question of the sink, twice as far as it parks offers."""
    settings = config(transport, lease_s=3.0, park_s=1.0)
    async with connected_pair(settings, 8, MIB) as pair:
        asked = questions(pair, monkeypatch)
        monkeypatch.setattr(pair.source, "_clock", lambda: time.monotonic() + 2.0 * len(asked))
        pair.source.offer(key("a"), GIVEN, KvReady(0, 0))
        pulling = pull(pair, "a")
        await eventually(lambda: len(asked) >= 6, within_s=10.0)
        assert not pulling.done()
        prefill(pair.source_pool, ALL, 9)
        pair.source.advance(key("a"), ALL)
        await pulling
        assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(GIVEN)


async def test_nothing_to_pull_still_waits_for_the_end_of_the_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with connected_pair(config("shm"), 8, MIB) as pair:
        asked = questions(pair, monkeypatch)
        pair.source.offer(key("a"), GIVEN, KvReady(5, 0))
        pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(6, 0), ()))
        await eventually(lambda: len(asked) > 3, within_s=10.0)
        assert not pulling.done()
        assert pair.released == []
        pair.source.advance(key("a"), ALL)
        report = await pulling
        assert (report.transport, report.moved_bytes) == ("", 0)
        assert pair.released == [(key("a"), ReleaseReason.COMMITTED)]


async def test_part_of_a_growing_leg_cannot_be_committed_before_its_end() -> None:
    async with connected_pair(config("shm"), 8, MIB) as pair:
        pair.source.offer(key("a"), GIVEN, KvReady(3, 0))
        with pytest.raises(TransferError, match="while its offer grows"):
            await pair.pull(key("a"), BlockRange(0, 3), blocks(0, 1, 2))
        await pair.wait_released(1, within_s=10.0)
        assert pair.released == [(key("a"), ReleaseReason.ABORTED_BY_SINK)]


async def test_withdrawn_offer_ends_the_wait_for_it(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected_pair(config(transport), 8, MIB) as pair:
        asked = questions(pair, monkeypatch)
        monkeypatch.setattr("kvtransfer.handoffs.pulling.WAIT_S", 0.9)
        pair.source.offer(key("a"), GIVEN, KvReady(0, 0))
        pulling = pull(pair, "a")
        await eventually(lambda: any(ask.wait_s > 0 for ask in asked), within_s=10.0)
        began_s = time.monotonic()
        pair.source.withdraw(key("a").leg_id)
        assert pair.released == [(key("a"), ReleaseReason.WITHDRAWN)]
        failure = await outcome_of(pulling)
        assert time.monotonic() - began_s < 1.0
        assert isinstance(failure, TransferError)
        pair.source.advance(key("a"), ALL)


async def test_sink_that_gives_up_waiting_gives_the_offer_back() -> None:
    async with connected_pair(config("shm"), 8, MIB) as pair:
        pair.source.offer(key("a"), GIVEN, KvReady(0, 0))
        failure = await outcome_of(pull(pair, "a", remaining_s=0.3))
        assert isinstance(failure, TransferError)
        assert failure.fault is TransferFault.TIMEOUT
        await pair.wait_released(1, within_s=10.0)
        assert pair.released == [(key("a"), ReleaseReason.ABORTED_BY_SINK)]


async def test_waiting_pulls_hold_no_turn() -> None:
    async with connected_pair(config("shm", max_pulls=1), 8, MIB) as pair:
        pair.source.offer(key("growing"), GIVEN, KvReady(0, 0))
        waiting = pull(pair, "growing")
        await eventually(lambda: pair.source.query(key("growing")) is HandoffState.ACCEPTED, within_s=10.0)
        pair.source.offer(key("whole"), blocks(2))
        await pair.pull(key("whole"), BlockRange(0, 1), blocks(5), remaining_s=2.0)
        pair.source.advance(key("growing"), ALL)
        await waiting


async def test_offer_that_shrinks_is_refused() -> None:
    async with connected_pair(config("shm"), 8, MIB) as pair:
        pair.source.offer(key("a"), GIVEN, KvReady(2, 0))
        with pytest.raises(ProtocolError, match="cannot shrink"):
            pair.source.advance(key("a"), KvReady(1, 0))
        pair.source.advance(key("unknown"), ALL)


async def test_a_sink_cannot_let_the_source_wait_longer_than_its_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kvtransfer.handoffs.source, "MAX_WAIT_S", 0.02)
    async with connected_pair(config("tcp"), 8, MIB) as pair:
        pair.source.offer(key("a"), GIVEN, KvReady(0, 0))
        sink = PeerId(WorkerId("decode-0"), Incarnation(1))
        pair.source.connect(Introduction(sink, "d", ("tcp",), "", (XXH3,)))
        transfer = Transfer(key("a"), 1, BlockRange(0, len(GIVEN)))
        async with asyncio.timeout(5.0):
            answer = await pair.source.pull(PullAsk(sink, "d", "tcp", transfer, wait_s=3600.0))
        assert (answer.ready, answer.piece) == (False, None)


OTHER_GRANTS: dict[str, Callable[[PullGrant], PullGrant]] = {
    "more bytes than its parts have": lambda grant: replace(grant, length_bytes=grant.length_bytes + 1),
    "parts beyond a block": lambda grant: replace(grant, part_offset=8, length_bytes=grant.length_bytes),
    "parts of no length": lambda grant: replace(grant, part_bytes=0, length_bytes=0),
    "other blocks": lambda grant: _of_range(grant, replace(grant.transfer.block_range, first_block=1)),
    "layers that were not asked for": lambda grant: _of_range(
        grant, replace(grant.transfer.block_range, num_layers=LAYERS + 1)
    ),
}


def _of_range(grant: PullGrant, part: BlockRange) -> PullGrant:
    return replace(grant, transfer=replace(grant.transfer, block_range=part))


@pytest.mark.parametrize("wrong", OTHER_GRANTS)
async def test_grant_of_what_was_not_asked_for_writes_nothing(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def granted(asked: Transfer, answer: PullResponse, asked_s: float) -> PullGrant:
        return OTHER_GRANTS[wrong](grant_from_wire(asked, answer, asked_s))

    monkeypatch.setattr(kvtransfer.handoffs.client, "grant_from_wire", granted)
    async with connected_pair(config("shm", checksum=False), 8, MIB) as pair:
        before = pair.sink_pool.read(blocks(*range(8)))
        pair.source.offer(key("a"), GIVEN)
        with pytest.raises(TransferError) as caught:
            await pair.pull(key("a"), BlockRange(0, len(GIVEN)), TARGETS)
        assert caught.value.fault is TransferFault.LENGTH
        assert pair.sink_pool.read(blocks(*range(8))) == before
        await pair.wait_released(1, within_s=10.0)
        assert pair.released == [(key("a"), ReleaseReason.ABORTED_BY_SINK)]


class TestFallbackInTheMiddle:
    """What a transport did well is not done again by the next."""

    async def test_pieces_that_landed_are_not_moved_again(self) -> None:
        sinks: dict[str, BreakingSink] = {}

        def wrap(inner: SinkTransport, pool: BlockMemory) -> SinkTransport:
            sinks[inner.name] = BreakingSink(inner, pool, 2 if inner.name == "shm" else 99)
            return sinks[inner.name]

        async with connected_pair(config("shm", "tcp"), 8, MIB, wrap) as pair:
            pair.source.offer(key("a"), GIVEN, KvReady(0, 0))
            pulling = pull(pair, "a")
            shm, tcp = sinks["shm"].grants, sinks["tcp"].grants
            for count, ready in enumerate((KvReady(2, 0), KvReady(3, 0), KvReady(3, 2), ALL), 1):
                await grow(pair, "a", ready, lambda: len(shm) + len(tcp), count)
            await pulling
            assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(GIVEN)
            assert [grant.transfer.block_range.first_block for grant in shm] == [0, 2]
            assert [grant.transfer.block_range.first_block for grant in tcp] == [3, 3]
            assert sum(grant.length_bytes for grant in (*shm, *tcp)) == len(GIVEN) * MIB

    async def test_wrong_bytes_are_found_at_the_commit_and_moved_by_the_next(self) -> None:
        def wrap(inner: SinkTransport, pool: BlockMemory) -> SinkTransport:
            weight = {Fault.CORRUPT: 1.0} if inner.name == "shm" else {Fault.NONE: 1.0}
            return FaultySink(inner, pool, FaultSchedule(1, weight))

        async with connected_pair(config("shm", "tcp"), 8, MIB, wrap) as pair:
            pair.source.offer(key("a"), GIVEN)
            report = await pair.pull(key("a"), BlockRange(0, len(GIVEN)), TARGETS)
            assert report.transport == "tcp"
            assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(GIVEN)
            assert pair.source.counts().refused[TransferFault.CHECKSUM] == 1
            await pair.wait_released(1, within_s=10.0)
            assert pair.released == [(key("a"), ReleaseReason.COMMITTED)]

    async def test_silent_transport_is_replaced_within_2_s_and_comes_back(self) -> None:
        silent = FaultSchedule(1, {Fault.DROP: 1.0})

        def wrap(inner: SinkTransport, pool: BlockMemory) -> SinkTransport:
            return FaultySink(inner, pool, silent) if inner.name == "shm" else inner

        settings = config("shm", "tcp", backoff_s=0.3)
        async with connected_pair(settings, 8, MIB, wrap) as pair:
            began_s = time.monotonic()
            for leg in ("a", "b"):
                pair.source.offer(key(leg), GIVEN)
                report = await pair.pull(key(leg), BlockRange(0, len(GIVEN)), TARGETS)
                assert report.transport == "tcp"
                assert time.monotonic() - began_s < 2.5, "each pull waited for the silent transport anew"
            assert len(silent.drawn) == 1
            silent.weights = {Fault.NONE: 1.0}
            async with asyncio.timeout(10.0):
                for number in itertools.count():
                    pair.source.offer(key(f"c-{number}"), GIVEN)
                    report = await pair.pull(key(f"c-{number}"), BlockRange(0, len(GIVEN)), TARGETS)
                    if report.transport == "shm":
                        break
