"""What no peer of ours would say is refused by name on every road, counted, and writes nothing."""

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import pytest

from kvtransfer.contract import BlockRange, HandoffKey, PeerId, PullGrant, Transfer
from kvtransfer.nccl.sink import NcclSink
from kvtransfer.tcp import framing
from kvtransfer.tcp.framing import Header, HeaderKind
from tandem.errors import TransferError, TransferFault
from tandem.worker import Role
from tests.kvtransfer.bad_peers import bad_source, link_of, say
from tests.kvtransfer.device_roads import checksums_in_host, roads_of
from tests.kvtransfer.pair import Pair, blocks, config, connected_pair, eventually, key, record
from tests.kvtransfer.test_observer import Heard

ROADS = ("shm", "tcp", "nccl", "cuda_ipc")
ASKING_ROADS = ("tcp", "nccl")
"""Those on which a sink asks for its bytes; the others read the source's memory."""

SINK = PeerId.of(record("decode-0", Role.DECODE))
SOURCE = PeerId.of(record("prefill-0", Role.PREFILL))
BLOCK_BYTES = 8192
QUICK_S = 0.5
PATIENT_S = 30.0
EVERYTHING = blocks(*range(32))
GREETING = framing.encode_greeting(b"?" * 32)
TRANSFER = Transfer(HandoffKey(key("a").leg_id, 3), 1000, BlockRange(0, 2))
LENGTH = 2 * BLOCK_BYTES
ASK = Header(HeaderKind.ASK, TRANSFER, LENGTH)


@pytest.fixture(autouse=True)
def kernel_in_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over device memory are computed here."""
    monkeypatch.setattr("kvtransfer.cuda.device.device_checksums", checksums_in_host)


def watched_pair(
    road: str, heard: Heard, digest: str = "d", patience_s: float = PATIENT_S
) -> AbstractAsyncContextManager[Pair]:
    """Over one road; the source waits for `patience_s` for words that were begun."""
    settings, patient = (config(road, connect_timeout_s=bound_s) for bound_s in (patience_s, PATIENT_S))
    return connected_pair(
        settings, roads=roads_of(road), observer=heard, sink_digest=digest, sink_settings=patient
    )


def patience_for(fault: TransferFault) -> float:
    """Short only where a test waits for its end."""
    return QUICK_S if fault is TransferFault.TIMEOUT else PATIENT_S


async def pull_works(pair: Pair, leg: str) -> None:
    """Whatever was said before, the pair still transfers."""
    pair.source.offer(key(leg), blocks(5))
    await pair.pull(key(leg), BlockRange(0, 1), blocks(6))
    assert pair.sink_pool.read(blocks(6)) == pair.source_pool.read(blocks(5))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("words", "hangs_up", "fault"),
    [
        pytest.param(GREETING[:20], True, TransferFault.TRUNCATED, id="half a greeting"),
        pytest.param(GREETING[:20], False, TransferFault.TIMEOUT, id="half a greeting and silence"),
        pytest.param(b"GET / HTTP/1.1\r\n" + bytes(64), False, TransferFault.UNSUPPORTED, id="a stranger"),
        pytest.param(
            GREETING[:4] + b"\0\1" + GREETING[6:], False, TransferFault.UNSUPPORTED, id="an old version"
        ),
        pytest.param(GREETING, False, TransferFault.REFUSED, id="a wrong ticket"),
    ],
)
async def test_bad_greeting_is_refused_and_counted(
    road: str, words: bytes, hangs_up: bool, fault: TransferFault
) -> None:
    heard = Heard()
    async with watched_pair(road, heard, patience_s=patience_for(fault)) as pair:
        await pull_works(pair, "before")
        address = (await pair.sink._sources.get(pair.source_record)).endpoints[0].address
        before = pair.sink_pool.read(EVERYTHING), pair.source_pool.read(EVERYTHING)
        answer = await say(link_of(road, address), words, hangs_up)
        assert heard.link_refusals == [(road, fault)]
        if fault is TransferFault.REFUSED:
            with pytest.raises(TransferError, match="refused"):
                framing.check_welcome(answer)
        assert (pair.sink_pool.read(EVERYTHING), pair.source_pool.read(EVERYTHING)) == before
        await pull_works(pair, "after")


async def ask(pair: Pair, road: str, words: bytes, hang_up: bool) -> Header | None:
    """Says it where the sink asks for transfers; what the source answers, None when it ends the link."""
    if road == "nccl":
        sink = pair.sink._transports[road]
        assert isinstance(sink, NcclSink)
        held = sink._pairs[SOURCE]
        await asyncio.get_running_loop().sock_sendall(held.link, words)
        if hang_up:
            held.link.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(5.0):
            answer = await held.answers.get()
        return None if isinstance(answer, TransferError) else answer
    endpoint = (await pair.sink._sources.get(pair.source_record)).endpoints[0]
    greeting = framing.encode_greeting(endpoint.ticket)
    heard = await say(link_of(road, endpoint.address), greeting + words, hang_up)
    framing.check_welcome(heard[: framing.WELCOME_BYTES])
    answer_bytes = heard[framing.WELCOME_BYTES :]
    if not answer_bytes:
        return None
    return framing.decode_header(answer_bytes[: framing.HEADER_BYTES], answer_bytes[framing.HEADER_BYTES :])


def long_leg() -> bytes:
    """A header that announces a longer leg id than there may be."""
    return framing.encode_header(ASK)[: framing.HEADER_BYTES - 2] + (513).to_bytes(2, "big")


@pytest.mark.parametrize("road", ASKING_ROADS)
@pytest.mark.parametrize(
    ("words", "hangs_up", "fault"),
    [
        pytest.param(framing.encode_header(ASK)[:30], True, TransferFault.TRUNCATED, id="half a header"),
        pytest.param(framing.encode_header(ASK)[:-1], True, TransferFault.TRUNCATED, id="half a leg id"),
        pytest.param(framing.encode_header(ASK)[:30], False, TransferFault.TIMEOUT, id="half, and silence"),
        pytest.param(bytes(framing.HEADER_BYTES), False, TransferFault.UNSUPPORTED, id="no header"),
        pytest.param(long_leg(), False, TransferFault.UNSUPPORTED, id="a leg id too long"),
        pytest.param(
            framing.encode_header(replace(ASK, kind=HeaderKind.BYTES)),
            False,
            TransferFault.UNSUPPORTED,
            id="bytes from a sink",
        ),
    ],
)
async def test_request_that_is_none_ends_the_link_and_is_counted(
    road: str, words: bytes, hangs_up: bool, fault: TransferFault
) -> None:
    heard = Heard()
    async with watched_pair(road, heard, patience_s=patience_for(fault)) as pair:
        await pull_works(pair, "before")
        before = pair.sink_pool.read(EVERYTHING), pair.source_pool.read(EVERYTHING)
        assert await ask(pair, road, words, hangs_up) is None
        assert heard.link_refusals == [(road, fault)]
        assert (pair.sink_pool.read(EVERYTHING), pair.source_pool.read(EVERYTHING)) == before
        await pull_works(pair, "after")


@pytest.mark.parametrize("road", ASKING_ROADS)
@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        pytest.param(
            replace(ASK, transfer=replace(TRANSFER, key=HandoffKey(TRANSFER.key.leg_id, 2))),
            TransferFault.STALE_EPOCH,
            id="a stale epoch",
        ),
        pytest.param(
            replace(ASK, transfer=replace(TRANSFER, key=key("b", 3))), TransferFault.REFUSED, id="another leg"
        ),
        pytest.param(
            replace(ASK, transfer=replace(TRANSFER, number=1001)), TransferFault.REFUSED, id="not granted"
        ),
        pytest.param(
            replace(ASK, transfer=replace(TRANSFER, block_range=BlockRange(0, 3))),
            TransferFault.LENGTH,
            id="another range",
        ),
        pytest.param(replace(ASK, length_bytes=3 * BLOCK_BYTES), TransferFault.LENGTH, id="more"),
        pytest.param(replace(ASK, length_bytes=LENGTH - 1), TransferFault.LENGTH, id="not whole blocks"),
        pytest.param(replace(ASK, offset_bytes=BLOCK_BYTES), TransferFault.LENGTH, id="beyond the end"),
    ],
)
async def test_request_for_what_is_not_granted_is_refused_by_name(
    road: str, asked: Header, fault: TransferFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.posts.MEETING_S", 0.1)
    heard = Heard()
    async with watched_pair(road, heard) as pair:
        await pull_works(pair, "before")
        before = pair.sink_pool.read(EVERYTHING), pair.source_pool.read(EVERYTHING)
        source = pair.source._transports[road]
        sending = asyncio.create_task(source.send(SINK, TRANSFER, blocks(1, 2), 0, BLOCK_BYTES))
        answer = await ask(pair, road, framing.encode_header(asked), hang_up=road == "tcp")
        assert answer is not None
        assert (answer.kind, answer.fault) == (HeaderKind.REFUSED, fault)
        assert heard.link_refusals == [(road, fault)]
        assert not sending.done()
        sending.cancel()
        await asyncio.wait((sending,))
        assert (pair.sink_pool.read(EVERYTHING), pair.source_pool.read(EVERYTHING)) == before
        await pull_works(pair, "after")


WELCOME = framing.encode_welcome(accepted=True)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("words", "fault"),
    [
        pytest.param(WELCOME[:5], TransferFault.TRUNCATED, id="half a welcome"),
        pytest.param(b"HTTP/1.1", TransferFault.UNSUPPORTED, id="a stranger"),
        pytest.param(WELCOME[:4] + b"\0\1" + WELCOME[6:], TransferFault.UNSUPPORTED, id="an old version"),
        pytest.param(WELCOME[:6] + b"\xff\xff", TransferFault.UNSUPPORTED, id="an unknown refusal"),
        pytest.param(
            framing.encode_welcome(accepted=False, fault=TransferFault.STALE_EPOCH),
            TransferFault.STALE_EPOCH,
            id="a stale epoch",
        ),
        pytest.param(None, TransferFault.TIMEOUT, id="silence"),
    ],
)
async def test_bad_welcome_is_a_named_fault(road: str, words: bytes | None, fault: TransferFault) -> None:
    async def answer(connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        if words is None:
            await asyncio.Event().wait()
        else:
            await loop.sock_sendall(connection, words)

    kit = roads_of(road)
    pool = kit.pool(32, BLOCK_BYTES)
    (sink,) = kit.taking(pool, config(road, connect_timeout_s=patience_for(fault)))
    before = pool.read(EVERYTHING)
    async with bad_source(road, answer) as address:
        with pytest.raises(TransferError) as caught:
            await sink.connect(SOURCE, address, b"t" * 32, BLOCK_BYTES)
        assert caught.value.fault is fault
        assert pool.read(EVERYTHING) == before
        await sink.close()
    pool.close()


@pytest.mark.parametrize("road", ASKING_ROADS)
@pytest.mark.parametrize(
    ("mangled", "fault"),
    [
        pytest.param(
            lambda told: replace(told, transfer=replace(told.transfer, key=key("another"))),
            TransferFault.REFUSED,
            id="another request",
        ),
        pytest.param(
            lambda told: replace(
                told, transfer=replace(told.transfer, key=replace(told.transfer.key, epoch=0))
            ),
            TransferFault.STALE_EPOCH,
            id="a stale epoch",
        ),
        pytest.param(
            lambda told: replace(told, length_bytes=told.length_bytes + 1), TransferFault.LENGTH, id="longer"
        ),
        pytest.param(
            lambda told: replace(told, length_bytes=told.length_bytes - 1), TransferFault.LENGTH, id="shorter"
        ),
        pytest.param(
            lambda told: replace(told, offset_bytes=BLOCK_BYTES), TransferFault.LENGTH, id="another place"
        ),
        pytest.param(
            lambda told: replace(told, kind=HeaderKind.ASK), TransferFault.REFUSED, id="another kind"
        ),
        pytest.param(
            lambda told: replace(told, kind=HeaderKind.REFUSED, fault=TransferFault.LENGTH),
            TransferFault.LENGTH,
            id="a refusal",
        ),
    ],
)
async def test_bytes_under_a_bad_header_are_not_taken(
    road: str,
    mangled: Callable[[Header], Header],
    fault: TransferFault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = framing.encode_header

    def spoil(header: Header) -> bytes:
        return encode(mangled(header) if header.kind is HeaderKind.BYTES else header)

    heard = Heard()
    async with watched_pair(road, heard) as pair:
        await pull_works(pair, "before")
        before = pair.sink_pool.read(EVERYTHING)
        monkeypatch.setattr("kvtransfer.tcp.framing.encode_header", spoil)
        pair.source.offer(key("spoilt"), blocks(1, 2))
        with pytest.raises(TransferError) as caught:
            await pair.pull(key("spoilt"), BlockRange(0, 2), blocks(3, 4))
        assert caught.value.fault is fault
        assert heard.failures == [(road, fault)]
        assert pair.sink_pool.read(EVERYTHING) == before
        await pair.wait_released(2, within_s=10.0)
        monkeypatch.undo()


async def test_header_that_is_cut_short_writes_nothing() -> None:
    async def answer(connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, framing.encode_welcome(accepted=True))
        await loop.sock_recv(connection, 1)
        told = Header(HeaderKind.BYTES, TRANSFER, LENGTH)
        await loop.sock_sendall(connection, framing.encode_header(told)[:30])

    kit = roads_of("tcp")
    pool = kit.pool(32, BLOCK_BYTES)
    pool.fill(2)
    before = pool.read(EVERYTHING)
    (sink,) = kit.taking(pool, config("tcp", connect_timeout_s=QUICK_S))
    async with bad_source("tcp", answer) as address:
        await sink.connect(SOURCE, address, b"t" * 32, BLOCK_BYTES)
        until_s = time.monotonic() + 5.0
        grant = PullGrant(TRANSFER, blocks(1, 2), 0, BLOCK_BYTES, LENGTH, until_s)
        with pytest.raises(TransferError) as caught:
            await sink.receive(SOURCE, grant, blocks(3, 4))
        assert caught.value.fault in (TransferFault.TRUNCATED, TransferFault.DISCONNECTED)
        assert pool.read(EVERYTHING) == before
        await sink.close()
    pool.close()


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("digest", "epoch", "wanted", "fault"),
    [
        ("another model", 2, BlockRange(0, 1), TransferFault.DIGEST),
        ("d", 1, BlockRange(0, 1), TransferFault.STALE_EPOCH),
        ("d", 2, BlockRange(1, 1), TransferFault.LENGTH),
        ("d", 2, BlockRange(0, 1, 3, 2), TransferFault.LENGTH),
    ],
    ids=["digest", "stale epoch", "blocks", "layers"],
)
async def test_bad_request_to_the_control_plane_is_refused_by_name(
    road: str, digest: str, epoch: int, wanted: BlockRange, fault: TransferFault
) -> None:
    heard = Heard()
    async with watched_pair(road, heard, digest) as pair:
        pair.source.offer(key("a", 1), blocks(4))
        pair.source.offer(key("a", 2), blocks(5))
        before = pair.sink_pool.read(EVERYTHING)
        with pytest.raises(TransferError) as caught:
            await pair.pull(key("a", epoch), wanted, blocks(1))
        assert caught.value.fault is fault
        assert heard.refusals == [fault]
        assert pair.sink_pool.read(EVERYTHING) == before


async def test_address_of_an_older_communicator_is_refused_and_counted() -> None:
    heard = Heard()
    async with watched_pair("nccl", heard) as pair:
        await pull_works(pair, "before")
        endpoint = (await pair.sink._sources.get(pair.source_record)).endpoints[0]
        words = framing.encode_greeting(endpoint.ticket) + (0).to_bytes(8, "big")
        answer = await say(link_of("nccl", endpoint.address), words, hang_up=False)
        with pytest.raises(TransferError) as caught:
            framing.check_welcome(answer)
        assert caught.value.fault is TransferFault.STALE_EPOCH
        await eventually(lambda: heard.link_refusals == [("nccl", TransferFault.STALE_EPOCH)], 1.0)
