"""What only a transport that sends can get wrong, and the way from one transport to the next."""

import asyncio
import time

import pytest

from kvtransfer.contract import BlockMemory, BlockRange, PeerId, SinkTransport, SourceTransport
from kvtransfer.faults import Fault, FaultSchedule, FaultySink, FaultySource
from kvtransfer.handoff import ReleaseReason
from kvtransfer.tcp_sink import TcpSink
from tandem.errors import TransferError, TransferFault
from tandem.ids import Incarnation
from tests.kvtransfer.pair import blocks, config, connected_pair, eventually, key, outcome_of


class TestSendingTransport:
    """What only a transport that sends can get wrong."""

    @pytest.mark.parametrize(
        ("fault", "named"),
        [(Fault.TRUNCATE, TransferFault.LENGTH), (Fault.CORRUPT, TransferFault.CHECKSUM)],
    )
    async def test_what_the_source_sends_wrongly_is_named(self, fault: Fault, named: TransferFault) -> None:
        def wrap(inner: SourceTransport) -> SourceTransport:
            return FaultySource(inner, FaultSchedule(1, {fault: 1.0}))

        async with connected_pair(config("tcp"), wrap_source=wrap) as pair:
            pair.source.offer(key("a"), blocks(1, 2))
            with pytest.raises(TransferError) as caught:
                await pair.pull(key("a"), BlockRange(0, 2), blocks(1, 2))
            assert caught.value.fault is named
            await pair.wait_released(1, within_s=2.0)

    async def test_large_transfer_is_spread_over_connections_that_are_kept(self) -> None:
        async with connected_pair(config("tcp"), num_blocks=32, block_bytes=400_000) as pair:
            given, targets = blocks(*range(0, 31, 2)), blocks(*range(31, 0, -2))
            for leg in ("a", "b"):
                pair.source.offer(key(leg), given)
                await pair.pull(key(leg), BlockRange(0, 16), targets)
                assert pair.sink_pool.read(targets) == pair.source_pool.read(given)
            tcp = pair.sink._transports["tcp"]
            assert isinstance(tcp, TcpSink)
            assert len(tcp._pairs[PeerId.of(pair.source_record)].idle) == 2

    async def test_source_that_sends_nothing_is_given_up(self) -> None:
        def wrap(inner: SourceTransport) -> SourceTransport:
            return FaultySource(inner, FaultSchedule(1, {Fault.DROP: 1.0}))

        settings = config("tcp", connect_timeout_s=0.4)
        async with connected_pair(settings, wrap_source=wrap) as pair:
            pair.source.offer(key("a"), blocks(1, 2))
            began_s = time.monotonic()
            with pytest.raises(TransferError) as caught:
                await pair.pull(key("a"), BlockRange(0, 2), blocks(1, 2))
            assert time.monotonic() - began_s < 2.0
            assert caught.value.fault in (TransferFault.TIMEOUT, TransferFault.REFUSED)
            await pair.wait_released(1, within_s=2.0)

    async def test_sink_that_closes_ends_its_pulls(self) -> None:
        def wrap(inner: SourceTransport) -> SourceTransport:
            return FaultySource(inner, FaultSchedule(1, {Fault.DROP: 1.0}))

        async with connected_pair(config("tcp", max_pulls=1), wrap_source=wrap) as pair:
            for leg in ("a", "b"):
                pair.source.offer(key(leg), blocks(1))
            pulls = [
                asyncio.create_task(pair.pull(key(leg), BlockRange(0, 1), blocks(number)))
                for number, leg in enumerate(("a", "b"))
            ]
            await eventually(lambda: pair.source.counts().in_flight == 1, within_s=2.0)
            began_s = time.monotonic()
            await pair.sink.close()
            assert time.monotonic() - began_s < 1.0
            for pulling in pulls:
                assert isinstance(await outcome_of(pulling), TransferError)
            assert [reason for _, reason in pair.released] == [ReleaseReason.ABORTED_BY_SINK] * 2
            pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(0, 1), blocks(1)))
            assert isinstance(await outcome_of(pulling), TransferError)

    async def test_lost_source_ends_its_pulls_only(self) -> None:
        def wrap(inner: SourceTransport) -> SourceTransport:
            return FaultySource(inner, FaultSchedule(1, {Fault.DROP: 1.0}))

        async with connected_pair(config("tcp"), wrap_source=wrap) as pair:
            pair.source.offer(key("a"), blocks(1))
            pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(0, 1), blocks(1)))
            await eventually(lambda: pair.source.counts().in_flight == 1, within_s=2.0)
            lost = pair.source_record
            await pair.sink.peer_lost(lost.worker_id, Incarnation(lost.incarnation + 1))
            await asyncio.sleep(0.05)
            assert not pulling.done()
            began_s = time.monotonic()
            await pair.sink.peer_lost(lost.worker_id, lost.incarnation)
            failure = await outcome_of(pulling)
            assert time.monotonic() - began_s < 1.0
            assert isinstance(failure, TransferError)
            assert failure.fault is TransferFault.DISCONNECTED


class TestFallback:
    """From one transport to the next."""

    async def test_next_transport_serves_when_the_first_fails(self) -> None:
        def wrap(inner: SinkTransport, pool: BlockMemory) -> SinkTransport:
            broken = FaultSchedule(1, {Fault.DISCONNECT: 1.0})
            return FaultySink(inner, pool, broken) if inner.name == "shm" else inner

        async with connected_pair(config("shm", "tcp"), wrap_sink=wrap) as pair:
            for round_number in range(5):
                pair.source.offer(key(f"leg-{round_number}"), blocks(5, 6))
                report = await pair.pull(key(f"leg-{round_number}"), BlockRange(0, 2), blocks(1, 2))
                assert report.transport == "tcp"
                assert pair.sink_pool.read(blocks(1, 2)) == pair.source_pool.read(blocks(5, 6))
            assert [reason for _, reason in pair.released] == [ReleaseReason.COMMITTED] * 5

    async def test_other_host_is_not_offered_shared_memory(self) -> None:
        async with connected_pair(config("shm", "tcp")) as pair:
            pair.source.offer(key("a"), blocks(5))
            pair.sink._sources._host_id = "another machine"
            report = await pair.pull(key("a"), BlockRange(0, 1), blocks(1))
            assert report.transport == "tcp"

    async def test_best_common_transport_is_taken(self) -> None:
        async with connected_pair(config("shm", "tcp")) as pair:
            pair.source.offer(key("a"), blocks(5))
            assert (await pair.pull(key("a"), BlockRange(0, 1), blocks(1))).transport == "shm"

    async def test_pair_without_a_common_transport_is_refused(self) -> None:
        settings = config("tcp")
        async with connected_pair(settings, sink_settings=config("shm")) as pair:
            pair.source.offer(key("a"), blocks(5))
            with pytest.raises(TransferError) as caught:
                await pair.pull(key("a"), BlockRange(0, 1), blocks(1))
            assert caught.value.fault is TransferFault.UNSUPPORTED
