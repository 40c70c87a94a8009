"""Edge: the taking side of the adoption benchmark: contiguous blocks change hands with another process."""

import mmap
import socket
import time

import numpy as np
import numpy.typing as npt

from benchmarks.kv_giver import TIMEOUT_S, touch
from benchmarks.kv_layouts import SOURCE_STEP, Layout
from benchmarks.kv_times import AdoptionTimes
from benchmarks.processes import exchange, running_module
from kvtransfer.shm.adoption import AdoptablePool
from kvtransfer.shm.adoption_link import AdoptionLink, adopt, ask_outcome, prepare


async def measured_adoption(layout: Layout, rounds: int) -> list[AdoptionTimes]:
    """Every count of a contiguous layout; the first round of each is thrown away."""
    size = layout.shape.block_bytes
    async with running_module("benchmarks.kv_giver", (str(layout.pool_blocks), str(size))) as process:
        name = (await exchange(process, b"")).strip()
        # The socket is closed last: its end says that nothing is mapped here any more.
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
            AdoptablePool(layout.pool_blocks, size) as pool,
        ):
            connection.connect(b"\0" + name)
            link = AdoptionLink(connection, pool, TIMEOUT_S)
            return [
                _measure(link, pool, layout, count, number * (rounds + 1), rounds)
                for number, count in enumerate(layout.counts)
            ]


def _measure(
    link: AdoptionLink, pool: AdoptablePool, layout: Layout, count: int, first: int, rounds: int
) -> AdoptionTimes:
    blocks = layout.blocks(count, SOURCE_STEP)
    moments = []
    for number in range(first, first + rounds + 1):
        touch(pool)
        if number:
            # Answered once the giver has touched its new pages, too.
            ask_outcome(link, pool, number - 1)
        began_s = time.perf_counter()
        prepared = prepare(link, pool, number, blocks, blocks)
        ready_s = time.perf_counter()
        adopt(link, pool, prepared)
        adopted_s = time.perf_counter()
        pages = np.frombuffer(pool.window(0, count * pool.block_bytes), dtype=np.uint8)[:: mmap.PAGESIZE]
        first_read_s, later_read_s = _read_s(pages), _read_s(pages)
        moments.append((ready_s - began_s, adopted_s - ready_s, first_read_s, later_read_s))
    prepares, adopts, first_reads, later_reads = zip(*moments[1:], strict=True)
    length = count * layout.shape.block_bytes
    return AdoptionTimes(count, length, prepares, adopts, first_reads, later_reads)


def _read_s(pages: npt.NDArray[np.uint8]) -> float:
    """Seconds to read one byte of each page."""
    began_s = time.perf_counter()
    pages.sum()
    return time.perf_counter() - began_s
