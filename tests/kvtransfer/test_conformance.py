"""What every transport must hold, each test over each of them and with codecs, with real sockets and gRPC.

The roads between device memories run over fakes of CUDA and NCCL that move real bytes; test_gpu.py has the
real ones.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

import pytest

from kvtransfer.contract import (
    BlockMemory,
    BlockRange,
    KvReady,
    PeerId,
    SinkTransport,
    TransferConfig,
)
from kvtransfer.cuda.ipc import CudaIpcSource
from kvtransfer.faults import Fault, FaultSchedule, FaultySink
from kvtransfer.handoffs.offers import Offer, Piece
from kvtransfer.handoffs.words import HandoffState, ReleaseReason
from kvtransfer.hashing import Hasher
from kvtransfer.nccl.source import NcclSource
from kvtransfer.shm.transport import ShmSource
from kvtransfer.tcp.source import TcpSource
from tandem.errors import TransferError, TransferFault
from tests.kvtransfer.coding import coding
from tests.kvtransfer.device_roads import checksums_in_host, roads_of
from tests.kvtransfer.held_sink import HeldSink
from tests.kvtransfer.pair import Pair, blocks, config, connected_pair, eventually, key, outcome_of


def faulty_sink(fault: Fault) -> Callable[[SinkTransport, BlockMemory], SinkTransport]:
    """Wraps a taking side so that every transfer has one fault."""

    def wrap(inner: SinkTransport, pool: BlockMemory) -> SinkTransport:
        return FaultySink(inner, pool, FaultSchedule(1, {fault: 1.0}))

    return wrap


def patient(transport: str, **changes: float) -> TransferConfig:
    """Settings whose bounds a slow machine keeps, but for those that a test is about."""
    usual = {"connect_timeout_s": 30.0, "stall_s": 30.0, "lease_s": 30.0}
    return config(transport, **(usual | changes))


def pair_over(road: "Road", settings: TransferConfig, **options: Any) -> AbstractAsyncContextManager[Pair]:
    """See connected_pair."""
    coded = None if road.codec is None else coding(road.codec, options.get("block_bytes", 8192))
    return connected_pair(settings, roads=roads_of(road.transport), coding=coded, **options)


@pytest.fixture(autouse=True)
def device_in_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over device memory are computed here, and its copies may take as long as a slow machine needs."""
    monkeypatch.setattr("kvtransfer.cuda.device.device_checksums", checksums_in_host)
    monkeypatch.setattr("kvtransfer.cuda.ipc.QUIET_S", 30.0)
    monkeypatch.setattr("kvtransfer.nccl.moves.QUIET_S", 30.0)


class Road(NamedTuple):
    """A transport, and how blocks are written on it."""

    transport: str
    codec: str | None = None

    @property
    def direct(self) -> bool:
        """Whether the sink reads the source's memory."""
        return self.transport in ("shm", "cuda_ipc")


ROADS = [
    *(Road(name) for name in ("shm", "tcp", "cuda_ipc", "nccl")),
    *(Road("shm", "fp8"), Road("tcp", "int8"), Road("tcp", "oaken")),
]
"""Codecs need pools in host memory; every codec on both of these is in codecs/test_coded_handoffs.py."""


@pytest.fixture(params=ROADS, ids=lambda road: "-".join(filter(None, road)))
def road(request: pytest.FixtureRequest) -> Road:
    """What is under test."""
    found = request.param
    assert isinstance(found, Road)
    return found


async def encoding_stopped(pair: Pair, road: Road) -> None:
    """Blocks that are being encoded come back with the end of their batch, others at once."""
    if road.codec is not None:
        await pair.wait_released(1, within_s=10.0)


class TestConformance:
    """The contract of SourceTransport and SinkTransport, as seen through a source and a sink."""

    async def test_scattered_blocks_arrive_in_order(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport)) as pair:
            given, targets = blocks(7, 8, 9, 3, 30, 0, 1), blocks(1, 2, 3, 20, 5, 11, 12)
            pair.source.offer(key("a"), given)
            before = pair.sink_pool.read(blocks(0, 4, 31))
            report = await pair.pull(key("a"), BlockRange(0, 7), targets)
            assert pair.sink_pool.read(targets) == pair.expected(given)
            assert pair.sink_pool.read(blocks(0, 4, 31)) == before
            assert (report.transport, report.moved_bytes) == (road.transport, 7 * pair.source.block_bytes)
            assert pair.released == [(key("a"), ReleaseReason.COMMITTED)]

    async def test_part_of_a_leg_is_pulled(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport)) as pair:
            given = blocks(7, 8, 9, 3, 30)
            pair.source.offer(key("a"), given)
            await pair.pull(key("a"), BlockRange(2, 3), blocks(4, 5, 6))
            assert pair.sink_pool.read(blocks(4, 5, 6)) == pair.expected(given[2:])

    async def test_nothing_needs_to_move_when_the_sink_has_it_all(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport)) as pair:
            pair.source.offer(key("a"), blocks(7, 8))
            report = await pair.pull(key("a"), BlockRange(2, 0), ())
            assert (report.transport, report.moved_bytes) == ("", 0)
            assert pair.released == [(key("a"), ReleaseReason.COMMITTED)]

    async def test_many_pulls_at_once_do_not_mix(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport, max_pulls=3), block_bytes=307_200) as pair:
            legs = [(key(f"leg-{i}"), blocks(4 * i, 4 * i + 2), blocks(2 * i, 2 * i + 1)) for i in range(7)]
            for name, given, _ in legs:
                pair.source.offer(name, given)
            async with asyncio.TaskGroup() as group:
                for name, _, targets in legs:
                    group.create_task(pair.pull(name, BlockRange(0, 2), targets))
            for _, given, targets in legs:
                assert pair.sink_pool.read(targets) == pair.expected(given)
            assert len(pair.released) == 7

    async def test_wrong_ticket_is_refused(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport)) as pair:
            pair.source.offer(key("a"), blocks(1))
            await pair.pull(key("a"), BlockRange(0, 1), blocks(1))
            inner = pair.sink._transports[road.transport]
            known = (await pair.sink._sources.get(pair.source_record)).endpoints[0]
            stranger = PeerId(pair.source_record.worker_id, pair.source_record.incarnation)
            await inner.disconnect(stranger)
            with pytest.raises(TransferError) as caught:
                await inner.connect(stranger, known.address, b"?" * 32, pair.source.block_bytes)
            assert caught.value.fault is TransferFault.REFUSED

    async def test_wrong_digest_is_refused(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport), sink_digest="another model") as pair:
            pair.source.offer(key("a"), blocks(1))
            with pytest.raises(TransferError) as caught:
                await pair.pull(key("a"), BlockRange(0, 1), blocks(1))
            assert caught.value.fault is TransferFault.DIGEST
            assert pair.source.counts().refused[TransferFault.DIGEST] >= 1

    async def test_stale_epoch_is_refused_and_the_new_one_served(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport)) as pair:
            pair.source.offer(key("a", 1), blocks(1))
            pair.source.offer(key("a", 2), blocks(2))
            await encoding_stopped(pair, road)
            assert pair.released == [(key("a", 1), ReleaseReason.SUPERSEDED)]
            with pytest.raises(TransferError) as caught:
                await pair.pull(key("a", 1), BlockRange(0, 1), blocks(1))
            assert caught.value.fault is TransferFault.STALE_EPOCH
            await pair.pull(key("a", 2), BlockRange(0, 1), blocks(1))
            assert pair.sink_pool.read(blocks(1)) == pair.expected(blocks(2))

    async def test_range_outside_of_the_leg_is_refused(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport)) as pair:
            pair.source.offer(key("a"), blocks(1, 2))
            with pytest.raises(TransferError) as caught:
                await pair.pull(key("a"), BlockRange(1, 2), blocks(1, 2))
            assert caught.value.fault is TransferFault.LENGTH

    async def test_some_layers_only_are_pulled(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport)) as pair:
            pair.source.offer(key("a"), blocks(1, 2))
            before = pair.sink_pool.read(blocks(1, 2))
            await pair.pull(key("a"), BlockRange(0, 2, first_layer=1, num_layers=2), blocks(1, 2))
            given = pair.expected(blocks(1, 2))
            expected = [
                old[:2048] + new[2048:6144] + old[6144:] for old, new in zip(before, given, strict=True)
            ]
            assert pair.sink_pool.read(blocks(1, 2)) == expected

    async def test_last_chunk_of_a_growing_offer_moves_by_layers(
        self, road: Road, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is not ready is written only when it is, so nothing of it can have been read before."""
        monkeypatch.setattr("kvtransfer.handoffs.pieces.MIN_PIECE_BYTES", 1)
        async with pair_over(road, patient(road.transport)) as pair:
            given, targets = blocks(3, 9, 1, 30), blocks(5, 2, 7, 0)
            layer_bytes = pair.source_pool.layer_bytes
            whole = pair.source_pool.read(given)
            for block in given[1:]:
                pair.source_pool.view(block)[2 * layer_bytes :] = bytes(2 * layer_bytes)
            granted: list[BlockRange] = []
            begin = pair.source._sums.begin

            def begun(offer: Offer, number: int, piece: Piece, hasher: Hasher) -> None:
                granted.append(piece.block_range)
                begin(offer, number, piece, hasher)

            monkeypatch.setattr(pair.source._sums, "begin", begun)
            pair.source.offer(key("a"), given, KvReady(1, 0))
            pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(0, 4), targets))
            await eventually(lambda: granted == [BlockRange(0, 1)], within_s=10.0)
            pair.source.advance(key("a"), KvReady(1, 2))
            await eventually(lambda: granted[1:] == [BlockRange(1, 3, 0, 2)], within_s=10.0)
            for block, content in zip(given, whole, strict=True):
                pair.source_pool.view(block)[:] = content
            pair.source.advance(key("a"), KvReady(4, 4))
            assert (await pulling).pieces == 3
            assert granted[2:] == [BlockRange(1, 3, 2, 2)]
            assert pair.sink_pool.read(targets) == pair.expected(given)

    async def test_layers_that_there_are_not_are_refused(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport)) as pair:
            pair.source.offer(key("a"), blocks(1, 2))
            with pytest.raises(TransferError) as caught:
                await pair.pull(key("a"), BlockRange(0, 2, first_layer=3, num_layers=2), blocks(1, 2))
            assert caught.value.fault is TransferFault.LENGTH

    @pytest.mark.parametrize("fault", [Fault.CORRUPT, Fault.TRUNCATE, Fault.REORDER])
    async def test_wrong_bytes_never_land(self, road: Road, fault: Fault) -> None:
        async with pair_over(road, patient(road.transport), wrap_sink=faulty_sink(fault)) as pair:
            pair.source.offer(key("a"), blocks(1, 2))
            with pytest.raises(TransferError) as caught:
                await pair.pull(key("a"), BlockRange(0, 2), blocks(1, 2))
            assert caught.value.fault is TransferFault.CHECKSUM
            await pair.wait_released(1, within_s=10.0)
            assert pair.released == [(key("a"), ReleaseReason.ABORTED_BY_SINK)]

    async def test_lease_overrun_fails_closed(self, road: Road) -> None:
        settings = patient(road.transport, lease_s=0.3)
        async with pair_over(road, settings, wrap_sink=HeldSink) as pair:
            pair.source.offer(key("a"), blocks(1, 2))
            before = pair.sink_pool.read(blocks(1, 2))
            with pytest.raises(TransferError) as caught:
                await pair.pull(key("a"), BlockRange(0, 2), blocks(1, 2))
            assert caught.value.fault is TransferFault.LEASE
            assert pair.sink_pool.read(blocks(1, 2)) == before
            await pair.wait_released(1, within_s=10.0)

    async def test_cancelled_pull_leaves_nothing_that_writes(self, road: Road) -> None:
        # Large enough to be cancelled half way; with a codec, computing takes longer than moving.
        size = 1 << (20 if road.codec is None else 17)
        async with pair_over(road, patient(road.transport), num_blocks=64, block_bytes=size) as pair:
            given, targets = blocks(*range(0, 64, 2)), blocks(*range(1, 64, 2))
            for round_number in range(6):
                name = key(f"leg-{round_number}")
                pair.source.offer(name, given)
                pulling = asyncio.create_task(pair.pull(name, BlockRange(0, 32), targets))
                # So many turns of the event loop later: before it asked, between, or when all is there.
                for _ in range(4**round_number):
                    await asyncio.sleep(0)
                pulling.cancel()
                await asyncio.wait((pulling,))
                for target in targets:
                    pair.sink_pool.view(target)[:8] = pair.sink_pool.view(target)[-8:] = bytes(8)
                # Whatever of the cancelled one might still be on its way is on it before this one.
                later = key(f"later-{round_number}")
                pair.source.offer(later, given[:1])
                await pair.pull(later, BlockRange(0, 1), blocks(0))
                for target in targets:
                    view = pair.sink_pool.view(target)
                    assert bytes(view[:8]) == bytes(view[-8:]) == bytes(8)
                    del view
            await pair.wait_released(12, within_s=10.0)
            pair.source.offer(key("after"), given)
            await pair.pull(key("after"), BlockRange(0, 32), targets)
            assert pair.sink_pool.read(targets) == pair.expected(given)

    async def test_withdrawn_offer_is_free_at_once(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport)) as pair:
            pair.source.offer(key("a"), blocks(1, 2))
            pair.source.withdraw(key("a").leg_id)
            await encoding_stopped(pair, road)
            assert pair.released == [(key("a"), ReleaseReason.WITHDRAWN)]
            with pytest.raises(TransferError) as caught:
                await pair.pull(key("a"), BlockRange(0, 2), blocks(1, 2))
            assert caught.value.fault is TransferFault.REFUSED

    async def test_withdrawn_offer_is_kept_while_it_is_read(self, road: Road) -> None:
        held: list[HeldSink] = []

        def hold(inner: SinkTransport, pool: BlockMemory) -> SinkTransport:
            held.append(HeldSink(inner, pool))
            return held[0]

        async with pair_over(road, patient(road.transport), wrap_sink=hold) as pair:
            pair.source.offer(key("a"), blocks(1, 2))
            pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(0, 2), blocks(1, 2)))
            async with asyncio.timeout(10.0):
                await held[0].began.wait()
            pair.source.withdraw(key("a").leg_id)
            if road.direct:
                assert pair.released == []
            held[0].may_go_on.set()
            failure = await outcome_of(pulling)
            assert isinstance(failure, TransferError)
            await pair.wait_released(1, within_s=10.0)
            assert pair.released == [(key("a"), ReleaseReason.WITHDRAWN)]

    async def test_unclaimed_offer_comes_back(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport, park_s=0.1)) as pair:
            pair.source.offer(key("a"), blocks(1, 2))
            await pair.wait_released(1, within_s=10.0)
            assert pair.released == [(key("a"), ReleaseReason.PARK_EXPIRED)]

    async def test_sink_that_goes_away_gives_the_blocks_back(self, road: Road) -> None:
        hanging = faulty_sink(Fault.DROP)
        async with pair_over(road, patient(road.transport), wrap_sink=hanging) as pair:
            pair.source.offer(key("a"), blocks(1, 2))
            pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(0, 2), blocks(1, 2)))
            await eventually(lambda: pair.source.counts().in_flight == 1, within_s=10.0)
            # The sink's transports close as they would in a process that dies, without a word by gRPC.
            inner = pair.sink._transports[road.transport]
            assert isinstance(inner, FaultySink)
            await inner.disconnect(PeerId.of(pair.source_record))
            began_s = time.monotonic()
            await pair.wait_released(1, within_s=10.0)
            assert time.monotonic() - began_s < 2.0
            assert pair.released == [(key("a"), ReleaseReason.PEER_LOST)]
            pulling.cancel()
            await asyncio.wait((pulling,))

    async def test_cancelled_disconnect_ends_the_link_all_the_same(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport)) as pair:
            pair.source.offer(key("a"), blocks(1))
            await pair.pull(key("a"), BlockRange(0, 1), blocks(1))
            source, giving = PeerId.of(pair.source_record), pair.source._transports[road.transport]
            assert isinstance(giving, ShmSource | TcpSource | CudaIpcSource | NcclSource)
            assert giving._listener._links
            disconnecting = asyncio.create_task(pair.sink._transports[road.transport].disconnect(source))
            await asyncio.sleep(0)
            disconnecting.cancel()
            await asyncio.wait((disconnecting,))
            assert disconnecting.cancelled()
            await eventually(lambda: not giving._listener._links, within_s=10.0)

    async def test_source_says_where_a_handoff_stands(self, road: Road) -> None:
        async with pair_over(road, patient(road.transport)) as pair:
            pair.source.offer(key("a"), blocks(1))
            assert pair.source.query(key("a")) is HandoffState.OFFERED
            await pair.pull(key("a"), BlockRange(0, 1), blocks(1))
            assert pair.source.query(key("a")) is HandoffState.COMMITTED
            assert pair.source.query(key("unknown")) is None

    async def test_source_that_closes_ends_the_pull(self, road: Road) -> None:
        hanging = faulty_sink(Fault.DROP)
        settings = patient(road.transport, lease_s=0.5)
        async with pair_over(road, settings, wrap_sink=hanging) as pair:
            pair.source.offer(key("a"), blocks(1))
            pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(0, 1), blocks(1)))
            await eventually(lambda: pair.source.counts().in_flight == 1, within_s=10.0)
            began_s = time.monotonic()
            await pair.source.close()
            assert time.monotonic() - began_s < 2.0
            assert pair.released == [(key("a"), ReleaseReason.CLOSED)]
            assert isinstance(await outcome_of(pulling), TransferError)
