"""What only a transport that sends can get wrong, and the way from one transport to the next."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import pytest

from kvtransfer.contract import (
    BlockMemory,
    BlockRange,
    HandoffKey,
    OnLanded,
    PeerId,
    PullGrant,
    SinkTransport,
    SourceTransport,
)
from kvtransfer.faults import Fault, FaultSchedule, FaultySink, FaultySource
from kvtransfer.handoffs.offers import CommitAnswer
from kvtransfer.handoffs.pulling import RETRY_PAUSE_S
from kvtransfer.handoffs.source import HandoffSource
from kvtransfer.handoffs.words import HandoffState, ReleaseReason
from kvtransfer.tcp.sink import TcpSink
from tandem.errors import ProtocolError, TransferError, TransferFault
from tandem.ids import BlockId, Incarnation
from tandem.worker import Role
from tests.kvtransfer.pair import (
    Pair,
    Pool,
    blocks,
    config,
    connected_pair,
    eventually,
    key,
    outcome_of,
    record,
)


class _SlowToStop:
    """A taking side that brings nothing and, when cancelled, ends only when it is let."""

    name = "shm"

    def __init__(self, inner: SinkTransport) -> None:
        self._inner = inner
        self.stopping = asyncio.Event()
        self.may_end = asyncio.Event()

    async def connect(self, source: PeerId, address: str, ticket: bytes, block_bytes: int) -> None:
        """As what is inside."""
        await self._inner.connect(source, address, ticket, block_bytes)

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """Stalls, as a device does that does not answer."""
        try:
            await asyncio.Event().wait()
            return 0.0
        except asyncio.CancelledError:
            self.stopping.set()
            await self.may_end.wait()
            raise

    async def disconnect(self, source: PeerId) -> None:
        """As what is inside."""
        await self._inner.disconnect(source)

    async def close(self) -> None:
        """As what is inside."""
        await self._inner.close()


class _UsedUp:
    """A taking side whose first address is used up, and which then cuts the channel to the source."""

    name = "tcp"

    def __init__(self, inner: SinkTransport, cut: Callable[[PeerId], Awaitable[None]]) -> None:
        self._inner = inner
        self._cut = cut
        self._connects = 0

    async def connect(self, source: PeerId, address: str, ticket: bytes, block_bytes: int) -> None:
        """Stale, then the cut, then as what is inside."""
        self._connects += 1
        if self._connects == 1:
            raise TransferError(TransferFault.STALE_EPOCH, "This address is used up.")
        if self._connects == 2:
            await self._cut(source)
        await self._inner.connect(source, address, ticket, block_bytes)

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """As what is inside."""
        return await self._inner.receive(source, grant, target, on_landed)

    async def disconnect(self, source: PeerId) -> None:
        """As what is inside."""
        await self._inner.disconnect(source)

    async def close(self) -> None:
        """As what is inside."""
        await self._inner.close()


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
            await pair.wait_released(1, within_s=10.0)

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
            await pair.wait_released(1, within_s=10.0)

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
            await eventually(lambda: pair.source.counts().in_flight == 1, within_s=10.0)
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
            await eventually(lambda: pair.source.counts().in_flight == 1, within_s=10.0)
            lost = pair.source_record
            await pair.sink.peer_lost(lost.worker_id, Incarnation(lost.incarnation + 1))
            # What would have been ended is ended before the next pull is over.
            pair.source.offer(key("b"), blocks(2))
            await pair.pull(key("b"), BlockRange(1, 0), ())
            assert not pulling.done()
            began_s = time.monotonic()
            await pair.sink.peer_lost(lost.worker_id, lost.incarnation)
            failure = await outcome_of(pulling)
            assert time.monotonic() - began_s < 1.0
            assert isinstance(failure, TransferError)
            assert failure.fault is TransferFault.DISCONNECTED

    async def test_commit_that_is_held_is_repeated_with_a_pause(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with connected_pair(config("tcp", settle_s=0.5)) as pair:
            asked: list[int] = []

            async def hold(_key: HandoffKey, _sink: PeerId, number: int, *_rest: object) -> CommitAnswer:
                asked.append(number)
                return CommitAnswer(HandoffState.LANDED)

            monkeypatch.setattr(pair.source, "commit", hold)
            pair.source.offer(key("a"), blocks(1))
            with pytest.raises(TransferError):
                await pair.pull(key("a"), BlockRange(0, 1), blocks(1))
            assert 1 < len(asked) <= 0.5 / RETRY_PAUSE_S + 1


class TestOwnerOfTheBlocks:
    """Whoever gets the blocks back may fail, too."""

    async def test_owner_that_cannot_take_blocks_back_is_told_of(self) -> None:
        def refuse(_key: HandoffKey, _reason: ReleaseReason) -> None:
            raise ProtocolError("These blocks are not known here.")

        pool = Pool(4, 8192)
        me = record("prefill-0", Role.PREFILL)
        source = HandoffSource(me, pool, config(park_s=0.01), time.monotonic, refuse, transports=())
        await source.start()
        assert source.wedged() is None
        source.offer(key("a"), blocks(1))
        await eventually(lambda: source.wedged() is not None, within_s=5.0)
        await source.close()
        pool.close()


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

    async def test_pull_that_is_cancelled_while_a_stalled_transfer_ends_takes_no_other_road(self) -> None:
        made: list[_SlowToStop] = []

        def wrap(inner: SinkTransport, _pool: BlockMemory) -> SinkTransport:
            if inner.name != "shm":
                return inner
            made.append(_SlowToStop(inner))
            return made[0]

        async with connected_pair(config("shm", "tcp", stall_s=0.05), wrap_sink=wrap) as pair:
            pair.source.offer(key("a"), blocks(5))
            pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(0, 1), blocks(1)))
            async with asyncio.timeout(5.0):
                await made[0].stopping.wait()
            pulling.cancel()
            await asyncio.sleep(0)
            made[0].may_end.set()
            assert isinstance(await outcome_of(pulling), asyncio.CancelledError)
            await pair.wait_released(1, within_s=10.0)
            assert [reason for _, reason in pair.released] == [ReleaseReason.ABORTED_BY_SINK]

    async def test_channel_that_fails_after_an_address_was_renewed_is_opened_anew(self) -> None:
        pairs: list[Pair] = []

        async def cut(source: PeerId) -> None:
            await pairs[0].sink._sources._known[source].client.close()

        async with connected_pair(config("tcp"), wrap_sink=lambda inner, _: _UsedUp(inner, cut)) as pair:
            pairs.append(pair)
            pair.source.offer(key("a"), blocks(5))
            failure = await outcome_of(pair.pull(key("a"), BlockRange(0, 1), blocks(1)))
            assert isinstance(failure, TransferError)
            assert failure.fault is TransferFault.DISCONNECTED
            pair.source.offer(key("b"), blocks(6))
            assert (await pair.pull(key("b"), BlockRange(0, 1), blocks(2))).transport == "tcp"

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


async def test_nothing_is_kept_of_sources_that_were_never_reached() -> None:
    async with connected_pair(config("tcp")) as pair:
        for life in range(1, 4):
            nowhere = record("prefill-9", Role.PREFILL, "127.0.0.1:1", incarnation=life)
            with pytest.raises(TransferError):
                await pair.sink.pull(key("a"), nowhere, BlockRange(0, 1), blocks(1), 0, 20.0)
        sources = pair.sink._sources
        await eventually(lambda: not sources.peers and not len(sources._connecting), within_s=10.0)
