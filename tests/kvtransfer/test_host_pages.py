"""A pool on a device moves over sockets through pinned memory, of which there is only so much."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from kvtransfer.device import DevicePool
from kvtransfer.tcp import host_pages
from kvtransfer.tcp.host_pages import HostPages, MappedPages, Part, PinnedPages, pages_of
from tandem.errors import TransferError, TransferFault
from tests.kvtransfer.fake_nccl import DevicePoolInHost, HostDevice, HostPinned
from tests.kvtransfer.pair import Pool, blocks

BLOCK_BYTES = 8192
GIVEN, TARGETS = blocks(7, 8, 9, 3, 30, 0, 1, 12), blocks(1, 2, 3, 20, 5, 11, 12, 31)


class CountingDevice(HostDevice):
    """Remembers what was pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.pinnings = 0

    def pinned(self, size_bytes: int) -> HostPinned:
        """See Device."""
        self.pinnings += 1
        return super().pinned(size_bytes)


def go_on() -> None:
    """No lease, no cancellation."""


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks fit one."""
    monkeypatch.setattr(host_pages, "SLOT_BYTES", 3 * BLOCK_BYTES)


@pytest.fixture(params=["host", "device"])
def reached(request: pytest.FixtureRequest) -> Iterator[tuple[Pool, HostPages]]:
    """A pool of each kind."""
    pool = Pool(32, BLOCK_BYTES) if request.param == "host" else DevicePoolInHost(32, BLOCK_BYTES)
    pool.fill(1)
    yield pool, pages_of(pool, lambda _index: HostDevice())
    pool.close()


def test_pages_are_chosen_by_where_the_pool_is() -> None:
    host, device = Pool(2, BLOCK_BYTES), DevicePoolInHost(2, BLOCK_BYTES)
    assert isinstance(pages_of(host, lambda _index: HostDevice()), MappedPages)
    assert isinstance(pages_of(device, lambda _index: HostDevice()), PinnedPages)
    host.close()
    device.close()


@pytest.mark.parametrize(("offset", "size"), [(0, BLOCK_BYTES), (2048, 1024)])
def test_the_parts_of_blocks_are_given_in_order(
    reached: tuple[Pool, HostPages], offset: int, size: int
) -> None:
    pool, pages = reached
    heard = bytearray()
    for views in pages.giving(Part(GIVEN, offset, size), go_on):
        for view in views:
            heard += view
    assert heard == b"".join(block[offset : offset + size] for block in pool.read(GIVEN))


@pytest.mark.parametrize(("offset", "size"), [(0, BLOCK_BYTES), (2048, 1024)])
def test_what_is_filled_lands_in_the_parts_and_nowhere_else(
    reached: tuple[Pool, HostPages], offset: int, size: int
) -> None:
    pool, pages = reached
    before = pool.read(blocks(*range(32)))
    told: list[int] = []
    for first, count, views in pages.taking(Part(TARGETS, offset, size), go_on):
        told += range(first, first + count)
        for view in views:
            view[:] = bytes([first + 1]) * len(view)
    assert told == list(range(len(TARGETS)))
    for number, (old, new) in enumerate(zip(before, pool.read(blocks(*range(32))), strict=True)):
        if number not in TARGETS:
            assert new == old
        else:
            assert (new[:offset], new[offset + size :]) == (old[:offset], old[offset + size :])
            assert len(set(new[offset : offset + size])) == 1


def test_slots_are_used_again_and_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pages, "MOST_PAIRS", 1)
    pool, device = DevicePoolInHost(32, BLOCK_BYTES), CountingDevice()
    pages = PinnedPages(DevicePool.of(pool), device)
    for _ in range(3):
        assert sum(len(view) for views in pages.giving(Part(GIVEN, 0, BLOCK_BYTES), go_on) for view in views)
    assert device.pinnings == 2
    with closing(pages.giving(Part(GIVEN, 0, BLOCK_BYTES), go_on)) as held:
        next(held)
        asked = threading.Event()

        def stop() -> None:
            asked.set()
            raise TransferError(TransferFault.LEASE, "The lease ended.")

        with pytest.raises(TransferError):
            next(pages.giving(Part(GIVEN, 0, BLOCK_BYTES), stop))
        assert asked.is_set()
    assert next(pages.giving(Part(GIVEN, 0, BLOCK_BYTES), go_on))
    pool.close()


def test_a_transfer_that_is_given_up_leaves_no_copy_under_way() -> None:
    pool = DevicePoolInHost(32, BLOCK_BYTES)
    pool.fill(1)
    pages = PinnedPages(DevicePool.of(pool), HostDevice())
    with closing(pages.taking(Part(TARGETS, 0, BLOCK_BYTES), go_on)) as steps:
        for _, _, (view,) in (next(steps), next(steps)):
            view[:] = bytes(len(view))
    later = Pool(32, BLOCK_BYTES)
    for filled in (pool, later):
        filled.fill(2)
    assert pool.read(blocks(*range(32))) == later.read(blocks(*range(32)))
    pool.close()
    later.close()
