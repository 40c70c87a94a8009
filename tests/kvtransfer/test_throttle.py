"""A throttled link carries so many bytes a second, one transfer after the other."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from kvtransfer.contract import BlockRange, PeerId, Transfer, TransferConfig
from kvtransfer.faults import ThrottledSource
from kvtransfer.shm.transport import ShmSource
from tandem.ids import Incarnation, WorkerId
from tests.kvtransfer.pair import Pool, blocks, key

SINK = PeerId(WorkerId("d"), Incarnation(1))
BYTES_PER_S = 80_000.0


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Four blocks of 1,000 bytes."""
    made = Pool(4, 1000)
    yield made
    made.close()


def _throttled(pool: Pool, jitter: float = 0.0, seed: int = 0) -> ThrottledSource:
    return ThrottledSource(ShmSource(pool, TransferConfig()), BYTES_PER_S, seed=seed, jitter=jitter)


async def _send(source: ThrottledSource, number: int, part_bytes: int) -> float:
    began_s = time.monotonic()
    transfer = Transfer(key("leg"), number, BlockRange(0, 4))
    await source.send(SINK, transfer, blocks(0, 1, 2, 3), 0, part_bytes)
    return time.monotonic() - began_s


async def test_a_transfer_takes_its_bytes_time_and_others_wait_for_it(pool: Pool) -> None:
    source = _throttled(pool)
    took_s = await asyncio.gather(_send(source, 1, 1000), _send(source, 2, 500))
    assert took_s[0] >= 0.049
    assert took_s[1] >= 0.074


async def test_jitter_stays_within_its_bounds(pool: Pool) -> None:
    source = _throttled(pool, jitter=0.5, seed=3)
    assert await _send(source, 1, 1000) >= 0.024


async def test_it_is_in_all_else_the_transport_inside(pool: Pool) -> None:
    source = _throttled(pool)
    assert (source.name, source.direct, source.same_host) == ("shm", True, True)
