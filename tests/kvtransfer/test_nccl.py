"""The nccl transport: real bytes over a fake NCCL, and every row of what the binding does badly."""

import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvtransfer.contract import BlockRange, PeerId, PullGrant, Transfer
from kvtransfer.nccl.address import NcclAddress
from kvtransfer.nccl.communicator import CommunicatorState
from kvtransfer.nccl.sink import NcclSink
from tandem.errors import TransferError, TransferFault
from tandem.ids import Incarnation, WorkerId
from tests.kvtransfer.fake_nccl import (
    PATIENT,
    QUICK,
    DevicePoolInHost,
    FakeNccl,
    HostLane,
    Mischief,
    host_kit,
)
from tests.kvtransfer.nccl_pair import BLOCK_BYTES, SINK, SOURCE, TICKET, nccl_pair
from tests.kvtransfer.nccl_peer import TRANSFER
from tests.kvtransfer.pair import blocks, config, eventually, key, outcome_of

ROOT = Path(__file__).resolve().parents[2]
SCATTERED = blocks(7, 8, 9, 3, 30, 0, 1, 12, 14, 13)
TARGETS = blocks(1, 2, 3, 20, 5, 11, 12, 31, 0, 22)


class TestBytes:
    """What arrives."""

    @pytest.mark.parametrize("old", [False, True], ids=["cupy 14", "cupy 13"])
    async def test_scattered_blocks_arrive_in_order_through_staging(self, old: bool) -> None:
        async with nccl_pair(old=old) as pair:
            await pair.connect()
            others = [block for block in blocks(*range(32)) if block not in TARGETS]
            before = pair.sink_pool.read(others)
            await pair.move(SCATTERED, TARGETS)
            assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(SCATTERED)
            assert pair.sink_pool.read(others) == before

    async def test_only_the_granted_part_of_each_block_is_written(self) -> None:
        async with nccl_pair() as pair:
            await pair.connect()
            before = pair.sink_pool.read(blocks(4, 9))
            await pair.move(blocks(1, 2), blocks(4, 9), part=(2048, 1024))
            given = pair.source_pool.read(blocks(1, 2))
            expected = [
                old[:2048] + new[2048:3072] + old[3072:] for old, new in zip(before, given, strict=True)
            ]
            assert pair.sink_pool.read(blocks(4, 9)) == expected

    async def test_transfers_at_one_time_take_turns_in_one_order(self) -> None:
        async with nccl_pair() as pair:
            await pair.connect()
            async with asyncio.TaskGroup() as group:
                for number in range(5):
                    group.create_task(
                        pair.move(blocks(number, number + 10), blocks(2 * number, 2 * number + 1))
                    )
            for number in range(5):
                targets, given = blocks(2 * number, 2 * number + 1), blocks(number, number + 10)
                assert pair.sink_pool.read(targets) == pair.source_pool.read(given)
            assert len(pair.source_nccl.made) == 1

    async def test_transfer_that_was_not_granted_is_refused_and_the_pair_lives_on(self) -> None:
        async with nccl_pair() as pair:
            await pair.connect()
            pair.source._box._past.append((SINK, 1))
            with pytest.raises(TransferError) as caught:
                await pair.move(blocks(1), blocks(1))
            assert caught.value.fault is TransferFault.REFUSED
            await pair.move(blocks(5), blocks(6))
            assert pair.sink_pool.read(blocks(6)) == pair.source_pool.read(blocks(5))

    async def test_no_more_than_two_slots_are_ever_in_flight(self) -> None:
        async with nccl_pair(source_mischief=Mischief(send_nothing=True)) as pair:
            await pair.connect()
            moving = asyncio.create_task(pair.move(SCATTERED, TARGETS, lease_s=0.4))
            assert isinstance(await outcome_of(moving), TransferError)
            assert pair.source_nccl.made[0].sends == [4 * BLOCK_BYTES, 4 * BLOCK_BYTES]


class TestOpening:
    """ncclCommInitRank blocks for ever when the peer is gone."""

    async def test_peer_that_never_opens_costs_the_bound_and_no_more(self) -> None:
        async with nccl_pair(Mischief(hang_open=True), limits=QUICK, connect_timeout_s=0.8) as pair:
            began_s = time.monotonic()
            failure = await outcome_of(pair.connect())
            assert isinstance(failure, TransferError)
            assert failure.fault in (TransferFault.TIMEOUT, TransferFault.DISCONNECTED)
            assert time.monotonic() - began_s < 1.5
            await eventually(lambda: pair.sink.counts().abandoned == 1, within_s=10)

    async def test_communicator_that_opens_too_late_is_aborted(self) -> None:
        async with nccl_pair(Mischief(hang_open=True), limits=QUICK, connect_timeout_s=0.8) as pair:
            await outcome_of(pair.connect())
            await eventually(lambda: pair.source.counts().abandoned == 1, within_s=10)
            pair.source_nccl.mischief.release.set()
            await eventually(lambda: len(pair.source_nccl.aborted) == 1, within_s=10)
            await eventually(lambda: len(pair.sink_nccl.aborted) == 1, within_s=10)
            await eventually(lambda: pair.source.counts().abandoned == 0, within_s=10)

    async def test_too_many_abandoned_openings_end_the_trying(self) -> None:
        async with nccl_pair(None, Mischief(hang_open=True), QUICK, connect_timeout_s=0.8) as pair:
            faults = []
            for _ in range(4):
                failure = await outcome_of(pair.connect())
                assert isinstance(failure, TransferError)
                faults.append(failure.fault)
                await eventually(lambda: pair.source.counts().open == 0, within_s=10)
                await pair.sink.disconnect(SOURCE)
                pair.source._pairs.clear()
            assert faults[-1] is TransferFault.UNSUPPORTED
            assert pair.sink.counts().abandoned == 2

    @pytest.mark.parametrize("status", [1, 2, 6, 7])
    async def test_failed_opening_is_a_transfer_error(self, status: int) -> None:
        async with nccl_pair(sink_mischief=Mischief(open_status=status)) as pair:
            failure = await outcome_of(pair.connect())
            assert isinstance(failure, TransferError)
            assert failure.fault is TransferFault.DISCONNECTED


class TestFailures:
    """What breaks under way: the pair is free within its bounds, and nothing wrong is written."""

    @pytest.mark.parametrize("status", [1, 3, 6])
    async def test_broken_communicator_fails_the_transfer_and_is_aborted_on_both_sides(
        self, status: int
    ) -> None:
        async with nccl_pair() as pair:
            await pair.connect()
            pair.source_nccl.mischief.async_status = status
            wire = pair.sink._pairs[SOURCE].communicator._wire
            assert wire is not None
            before = pair.sink_pool.read(TARGETS)
            began_s = time.monotonic()
            failure = await outcome_of(pair.move(SCATTERED, TARGETS))
            assert isinstance(failure, TransferError)
            assert failure.fault is TransferFault.DISCONNECTED
            assert time.monotonic() - began_s < 2.0
            await eventually(lambda: len(pair.source_nccl.aborted) == 1, within_s=10)
            assert len(pair.sink_nccl.aborted) == 1
            for lane in (wire.sending, wire.copying):
                assert isinstance(lane, HostLane)
                await lane.emptied()
            landed = pair.sink_pool.read(TARGETS)
            given = pair.source_pool.read(SCATTERED)
            assert all(now in (old, new) for now, old, new in zip(landed, before, given, strict=True))

    async def test_work_in_progress_is_no_failure(self) -> None:
        async with nccl_pair(Mischief(async_status=7), Mischief(async_status=7)) as pair:
            await pair.connect()
            await pair.move(SCATTERED, TARGETS)
            assert pair.sink_pool.read(TARGETS) == pair.source_pool.read(SCATTERED)

    async def test_send_that_is_refused_ends_the_pair(self) -> None:
        async with nccl_pair(source_mischief=Mischief(send_status=6)) as pair:
            await pair.connect()
            assert isinstance(await outcome_of(pair.move(blocks(1), blocks(1))), TransferError)
            await eventually(lambda: len(pair.sink_nccl.aborted) == 1, within_s=10)

    async def test_message_of_another_length_is_never_unpacked(self) -> None:
        async with nccl_pair(source_mischief=Mischief(truncate=True)) as pair:
            await pair.connect()
            before = pair.sink_pool.read(blocks(1, 2))
            assert isinstance(await outcome_of(pair.move(blocks(8, 9), blocks(1, 2))), TransferError)
            assert pair.sink_pool.read(blocks(1, 2)) == before

    async def test_lease_that_ends_stops_the_transfer(self) -> None:
        async with nccl_pair(source_mischief=Mischief(send_nothing=True)) as pair:
            await pair.connect()
            before = pair.sink_pool.read(blocks(1, 2))
            failure = await outcome_of(pair.move(blocks(8, 9), blocks(1, 2), lease_s=0.3))
            assert isinstance(failure, TransferError)
            assert failure.fault is TransferFault.LEASE
            assert pair.sink_pool.read(blocks(1, 2)) == before

    async def test_cancelled_receive_has_stopped_when_it_raises(self) -> None:
        async with nccl_pair(source_mischief=Mischief(send_nothing=True)) as pair:
            await pair.connect()
            moving = asyncio.create_task(pair.move(SCATTERED, TARGETS))
            await eventually(lambda: any(held.busy for held in pair.sink._shelf._held), within_s=10)
            began_s = time.monotonic()
            moving.cancel()
            await asyncio.wait((moving,))
            assert moving.cancelled()
            assert time.monotonic() - began_s < 1.5
            assert len(pair.sink_nccl.aborted) == 1

    async def test_send_that_is_given_up_when_its_bytes_are_there_leaves_the_pair_alive(self) -> None:
        async with nccl_pair(limits=replace(PATIENT, stop_s=30.0)) as pair:
            await pair.connect()
            for number in range(8):
                await pair.move(blocks(number, number + 8), blocks(1, 2))
                assert pair.sink_pool.read(blocks(1, 2)) == pair.source_pool.read(blocks(number, number + 8))
            assert len(pair.source_nccl.made) == 1
            assert pair.source_nccl.aborted == []

    async def test_send_that_is_given_up_before_it_was_asked_for_is_refused(self) -> None:
        async with nccl_pair() as pair:
            await pair.connect()
            transfer = Transfer(key("a"), 7, BlockRange(0, 1))
            sending = asyncio.create_task(pair.source.send(SINK, transfer, blocks(1), 0, BLOCK_BYTES))
            await eventually(lambda: bool(pair.source._box._posts), within_s=10)
            sending.cancel()
            await asyncio.wait((sending,))
            grant = PullGrant(transfer, blocks(1), 0, BLOCK_BYTES, BLOCK_BYTES, time.monotonic() + 5)
            with pytest.raises(TransferError) as caught:
                await pair.sink.receive(SOURCE, grant, blocks(1))
            assert caught.value.fault is TransferFault.REFUSED
            await pair.move(blocks(3), blocks(4))
            assert pair.source_nccl.aborted == []

    async def test_lost_link_frees_the_source_in_the_middle_of_a_send(self) -> None:
        async with nccl_pair(sink_mischief=Mischief(send_nothing=True)) as pair:
            pair.source_nccl.mischief.send_nothing = True
            await pair.connect()
            moving = asyncio.create_task(pair.move(SCATTERED, TARGETS))
            await eventually(lambda: any(held.busy for held in pair.source._shelf._held), within_s=10)
            began_s = time.monotonic()
            pair.sink._pairs[SOURCE].link.shutdown(2)
            await eventually(lambda: pair.lost == [SINK], within_s=10)
            assert isinstance(await outcome_of(moving), TransferError)
            assert time.monotonic() - began_s < 2.0

    async def test_source_killed_in_the_middle_of_a_transfer_frees_the_sink(self) -> None:
        pool, nccl = DevicePoolInHost(8, BLOCK_BYTES), FakeNccl()
        sink = NcclSink(pool, config("nccl"), time.monotonic, host_kit(nccl))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.kvtransfer.nccl_peer"), cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            address = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
            await sink.connect(SOURCE, address, TICKET, BLOCK_BYTES)
            until_s = time.monotonic() + 30
            grant = PullGrant(TRANSFER, blocks(0, 1, 2, 3), 0, BLOCK_BYTES, 4 * BLOCK_BYTES, until_s)
            receiving = asyncio.create_task(sink.receive(SOURCE, grant, blocks(4, 5, 6, 7)))
            await eventually(lambda: any(held.busy for held in sink._shelf._held), within_s=5)
            process.kill()
            killed_s = time.monotonic()
            failure = await outcome_of(receiving)
            assert time.monotonic() - killed_s < 2.0
            assert isinstance(failure, TransferError)
            assert len(nccl.aborted) == 1
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await sink.close()
            pool.close()


class TestAborting:
    """ncclCommAbort can hang, and a destructor would."""

    async def test_hanging_abort_is_bounded_and_asks_for_a_restart(self) -> None:
        async with nccl_pair(sink_mischief=Mischief(hang_abort=True), limits=QUICK) as pair:
            await pair.connect()
            assert pair.sink.counts().wedged is None
            began_s = time.monotonic()
            await pair.sink.disconnect(SOURCE)
            assert time.monotonic() - began_s < 1.0
            assert pair.sink.counts().wedged == "An NCCL abort hangs."
            await eventually(lambda: len(pair.source_nccl.aborted) == 1, within_s=10)

    async def test_every_communicator_is_aborted_before_it_is_collected(self) -> None:
        async with nccl_pair() as pair:
            await pair.connect()
            await pair.move(blocks(1), blocks(1))
        assert pair.sink_nccl.aborted == pair.sink_nccl.made
        assert pair.source_nccl.aborted == pair.source_nccl.made

    async def test_close_is_quick_while_everything_hangs(self) -> None:
        mischief = Mischief(send_nothing=True, hang_abort=True), Mischief(hang_abort=True)
        async with nccl_pair(*mischief, limits=QUICK) as pair:
            await pair.connect()
            moving = asyncio.create_task(pair.move(SCATTERED, TARGETS))
            await eventually(lambda: any(held.busy for held in pair.source._shelf._held), within_s=10)
            began_s = time.monotonic()
            await asyncio.gather(pair.sink.close(), pair.source.close())
            assert time.monotonic() - began_s < 2.0
            assert isinstance(await outcome_of(moving), TransferError)


class TestEpochs:
    """A communicator that is over is never used again; the next has another id and epoch."""

    async def test_used_up_address_is_named_and_a_new_one_serves(self) -> None:
        async with nccl_pair() as pair:
            old = await pair.connect()
            pair.sink._pairs[SOURCE].communicator.end()
            with pytest.raises(TransferError) as caught:
                await pair.sink.connect(SOURCE, old, TICKET, BLOCK_BYTES)
            assert caught.value.fault is TransferFault.STALE_EPOCH
            await eventually(lambda: pair.lost == [SINK], within_s=10)
            new = await pair.connect()
            first, second = NcclAddress.parse(old), NcclAddress.parse(new)
            assert second.epoch > first.epoch
            assert second.unique_id != first.unique_id
            await pair.move(blocks(1), blocks(2))
            assert pair.sink_pool.read(blocks(2)) == pair.source_pool.read(blocks(1))

    async def test_address_of_an_epoch_that_the_source_left_is_refused(self) -> None:
        async with nccl_pair() as pair:
            old = pair.source.endpoint(SINK, TICKET)
            assert old is not None
            pair.source._pairs[SINK].communicator.end()
            assert pair.source.endpoint(SINK, TICKET) != old
            with pytest.raises(TransferError) as caught:
                await pair.sink.connect(SOURCE, old, TICKET, BLOCK_BYTES)
            assert caught.value.fault is TransferFault.STALE_EPOCH
            assert pair.refused == [TransferFault.STALE_EPOCH]
            assert pair.sink_nccl.made == []

    async def test_wrong_ticket_opens_nothing(self) -> None:
        async with nccl_pair() as pair:
            address = pair.source.endpoint(SINK, TICKET)
            assert address is not None
            with pytest.raises(TransferError) as caught:
                await pair.sink.connect(SOURCE, address, b"?" * 32, BLOCK_BYTES)
            assert caught.value.fault is TransferFault.REFUSED
            assert pair.source_nccl.made == pair.sink_nccl.made == []

    async def test_newer_life_of_a_sink_replaces_the_older_one(self) -> None:
        async with nccl_pair() as pair:
            await pair.connect()
            newer = PeerId(SINK.worker_id, Incarnation(SINK.incarnation + 1))
            assert pair.source.endpoint(newer, b"n" * 32) is not None
            await eventually(lambda: len(pair.source_nccl.aborted) == 1, within_s=10)


class TestRoom:
    """A communicator costs memory on the device."""

    async def test_least_recently_used_one_is_closed_first_and_memory_is_told(self) -> None:
        async with nccl_pair(limits=replace(PATIENT, slot_bytes=BLOCK_BYTES)) as pair:
            peers = [PeerId(WorkerId(f"decode-{number}"), Incarnation(1)) for number in range(3)]
            sinks = []
            try:
                for number, peer in enumerate(peers):
                    ticket = bytes([number]) * 32
                    address = pair.source.endpoint(peer, ticket)
                    assert address is not None
                    sink = NcclSink(pair.sink_pool, config("nccl"), time.monotonic, host_kit(pair.sink_nccl))
                    sinks.append(sink)
                    await sink.connect(SOURCE, address, ticket, BLOCK_BYTES)
                    await eventually(lambda: pair.source.counts().open >= 1, within_s=10)
                await eventually(lambda: pair.source.counts().open == 2, within_s=10)
                assert pair.source.counts().bytes == 2 * 2 * BLOCK_BYTES
                assert pair.source._pairs[peers[0]].communicator.state is CommunicatorState.CLOSED
                assert pair.lost == [peers[0]]
                await eventually(lambda: sinks[0].counts().open == 0, within_s=10)
            finally:
                for sink in sinks:
                    await sink.close()
