"""A whole offer is hashed before anybody asks for it, and the sums are those that its commit is held to."""

import threading
from collections.abc import Callable, Sequence

import pytest

from kvtransfer.contract import BlockRange, KvReady
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.hashing import INLINE_BYTES, NativeHasher
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId
from tests.kvtransfer.pair import Pair, blocks, config, connected_pair, eventually, key

BLOCK_BYTES = INLINE_BYTES // 2
GIVEN, TARGETS = blocks(0, 2, 4, 6), blocks(1, 3, 5, 7)
LAYERS = 4

Hashed = list[tuple[Sequence[BlockId], int, int]]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Hashed:
    """(blocks, part_offset, part_bytes) of whatever was hashed at one go, when it was done."""
    found: Hashed = []
    sums = NativeHasher.sums

    def heard(
        self: NativeHasher,
        given: Sequence[BlockId],
        part_offset: int,
        part_bytes: int,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[int, ...]:
        known = sums(self, given, part_offset, part_bytes, stopped)
        found.append((tuple(given), part_offset, part_bytes))
        return known

    monkeypatch.setattr(NativeHasher, "sums", heard)
    return found


def by_source(hashed: Hashed) -> Hashed:
    """What the source hashed of its blocks; the sink hashes as they land, or the targets."""
    return [entry for entry in hashed if set(entry[0]) & set(GIVEN)]


async def pulled(pair: Pair, wanted: BlockRange) -> None:
    """Pulls and looks at what came."""
    part = slice(wanted.first_block, wanted.first_block + wanted.num_blocks)
    await pair.pull(key("a"), wanted, TARGETS[part])
    assert pair.sink_pool.read(TARGETS[part]) == pair.source_pool.read(GIVEN[part])


@pytest.mark.parametrize("road", ["shm", "tcp"])
class TestSumsAhead:
    """Over roads between host pools."""

    async def test_an_offer_is_hashed_once_and_before_it_is_pulled(self, road: str, hashed: Hashed) -> None:
        async with connected_pair(config(road), block_bytes=BLOCK_BYTES) as pair:
            pair.source.offer(key("a"), GIVEN)
            await eventually(lambda: by_source(hashed) == [(GIVEN, 0, BLOCK_BYTES)], within_s=5.0)
            await pulled(pair, BlockRange(0, 4))
            assert by_source(hashed) == [(GIVEN, 0, BLOCK_BYTES)]

    async def test_some_of_its_blocks_need_no_hashing_of_their_own(self, road: str, hashed: Hashed) -> None:
        async with connected_pair(config(road), block_bytes=BLOCK_BYTES) as pair:
            pair.source.offer(key("a"), GIVEN)
            await pulled(pair, BlockRange(1, 3))
            assert by_source(hashed) == [(GIVEN, 0, BLOCK_BYTES)]

    async def test_bytes_that_changed_after_the_offer_are_refused(self, road: str, hashed: Hashed) -> None:
        async with connected_pair(config(road), block_bytes=BLOCK_BYTES) as pair:
            pair.source.offer(key("a"), GIVEN)
            await eventually(lambda: bool(by_source(hashed)), within_s=5.0)
            pair.source_pool.view(GIVEN[2])[12_345] ^= 1
            with pytest.raises(TransferError) as caught:
                await pair.pull(key("a"), BlockRange(0, 4), TARGETS)
            assert caught.value.fault is TransferFault.CHECKSUM

    async def test_some_layers_are_hashed_when_they_are_granted(self, road: str, hashed: Hashed) -> None:
        async with connected_pair(config(road), block_bytes=BLOCK_BYTES) as pair:
            pair.source.offer(key("a"), GIVEN)
            layers = BlockRange(0, 4, first_layer=1, num_layers=3)
            await pair.pull(key("a"), layers, TARGETS)
            part = GIVEN, BLOCK_BYTES // LAYERS, BLOCK_BYTES // LAYERS * 3
            assert by_source(hashed) == [(GIVEN, 0, BLOCK_BYTES), part]

    async def test_an_offer_that_grew_unasked_is_hashed_when_it_is_whole(
        self, road: str, hashed: Hashed
    ) -> None:
        async with connected_pair(config(road), block_bytes=BLOCK_BYTES) as pair:
            pair.source.offer(key("a"), GIVEN, KvReady(2, 0))
            pair.source.advance(key("a"), KvReady(3, 0))
            pair.source.advance(key("a"), KvReady(4, LAYERS))
            await pulled(pair, BlockRange(0, 4))
            assert by_source(hashed) == [(GIVEN, 0, BLOCK_BYTES)]

    async def test_a_withdrawn_offer_is_kept_until_it_is_read_no_more(
        self, road: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        began, may_end = threading.Event(), threading.Event()
        sums = NativeHasher.sums

        def held_up(
            self: NativeHasher,
            given: Sequence[BlockId],
            part_offset: int,
            part_bytes: int,
            stopped: Callable[[], bool] = lambda: False,
        ) -> tuple[int, ...]:
            began.set()
            may_end.wait(5.0)
            return sums(self, given, part_offset, part_bytes, stopped)

        monkeypatch.setattr(NativeHasher, "sums", held_up)
        async with connected_pair(config(road), block_bytes=BLOCK_BYTES) as pair:
            pair.source.offer(key("a"), GIVEN)
            await eventually(began.is_set, within_s=5.0)
            pair.source.withdraw(key("a").leg_id)
            assert pair.released == []
            may_end.set()
            await pair.wait_released(1, within_s=5.0)
            assert pair.released == [(key("a"), ReleaseReason.WITHDRAWN)]
