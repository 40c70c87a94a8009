"""Either process dies by SIGKILL in the middle of a transfer: the other is free within 2 s."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvtransfer.contract import BlockRange, PeerId
from kvtransfer.faults import Fault
from kvtransfer.handoffs.sink import HandoffSink
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.tcp.sink import TcpSink
from kvtransfer.transports import sink_transports
from tandem.errors import TransferError
from tandem.ids import BlockId
from tandem.worker import Role
from tests.kvtransfer.held_sink import HeldSink
from tests.kvtransfer.pair import (
    TOKEN,
    Pool,
    blocks,
    config,
    eventually,
    key,
    outcome_of,
    record,
    served_source,
)

ROOT = Path(__file__).resolve().parents[2]
NUM_BLOCKS = 8
BLOCK_BYTES = 65536


@asynccontextmanager
async def peer(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process with the other side; killed at the end if it still lives."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.kvtransfer.peer_process", *arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line_of(process: asyncio.subprocess.Process) -> str:
    """Its next line that is not a log entry."""
    assert process.stdout is not None
    async with asyncio.timeout(20):
        while True:
            line = (await process.stdout.readline()).decode().strip()
            if line == "granted" or line.startswith("127.0.0.1:"):
                return line
            assert line, "the peer died early"


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_dead_source_frees_the_sink(transport: str) -> None:
    """Over shm the mapped pages live on, but what nobody verified is not used."""
    size = (str(NUM_BLOCKS), str(BLOCK_BYTES), transport)
    hang = Fault.DROP if transport == "tcp" else Fault.NONE
    async with peer("source", *size, hang.value) as process:
        address = await line_of(process)
        pool = Pool(NUM_BLOCKS, BLOCK_BYTES)
        settings = config(transport)
        held = [HeldSink(inner, pool) for inner in sink_transports(pool, settings, time.monotonic)]
        me = record("decode-0", Role.DECODE)
        sink = HandoffSink(me, pool, settings, time.monotonic, TOKEN, transports=held)
        source = record("prefill-0", Role.PREFILL, address)
        targets = [BlockId(block) for block in range(NUM_BLOCKS)]
        pulling = asyncio.create_task(
            sink.pull(key("a"), source, BlockRange(0, NUM_BLOCKS), targets, 0, 30.0)
        )
        async with asyncio.timeout(10):
            await held[0].began.wait()
        if transport == "tcp":
            held[0].may_go_on.set()
            tcp = held[0]._inner
            assert isinstance(tcp, TcpSink)
            await eventually(lambda: bool(tcp._pairs[PeerId.of(source)].active), within_s=10)
        process.kill()
        killed_s = time.monotonic()
        await process.wait()
        held[0].may_go_on.set()
        failure = await outcome_of(pulling)
        assert time.monotonic() - killed_s < 2.0
        # Also where all bytes came in time: nobody is left to say that they are the right ones.
        assert isinstance(failure, TransferError)
        await sink.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_dead_sink_frees_the_source(transport: str) -> None:
    pool = Pool(NUM_BLOCKS, BLOCK_BYTES)
    pool.fill(1)
    released: list[tuple[object, ReleaseReason]] = []
    async with served_source(pool, config(transport, lease_s=20.0), released) as (source, me):  # type: ignore[arg-type]
        source.offer(key("a"), blocks(*range(NUM_BLOCKS)))
        size = (str(NUM_BLOCKS), str(BLOCK_BYTES), transport)
        async with peer("sink", me.address, *size, Fault.DROP.value) as process:
            assert await line_of(process) == "granted"
            assert source.counts().in_flight == 1
            process.kill()
            killed_s = time.monotonic()
            await eventually(lambda: bool(released), within_s=5)
            assert time.monotonic() - killed_s < 2.0
            assert released == [(key("a"), ReleaseReason.PEER_LOST)]
