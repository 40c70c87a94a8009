"""What no source of ours would answer is a named fault; what a sink says out of turn is counted."""

import asyncio
import math
import socket
from collections.abc import Callable

import pytest

from kvtransfer.checksums import XXH3
from kvtransfer.contract import BlockRange, KvReady, PeerId, Transfer
from kvtransfer.cuda.driver import HANDLE_BYTES
from kvtransfer.cuda.ipc import IpcAddress
from kvtransfer.handoffs.client import HandoffClient
from kvtransfer.handoffs.pairing import Introduction
from kvtransfer.handoffs.wire import grant_from_wire
from kvtransfer.handoffs.words import HandoffState
from kvtransfer.nccl.address import NcclAddress
from kvtransfer.nccl.binding import UNIQUE_ID_BYTES
from kvtransfer.nccl.source import MAX_ASKS, NcclSource
from kvtransfer.tcp import framing
from kvtransfer.tcp.framing import Header, HeaderKind
from tandem.errors import TransferError, TransferFault
from tandem.v1 import worker_pb2 as pb
from tandem.worker import Role
from tests.kvtransfer.bad_peers import link_of, say
from tests.kvtransfer.device_roads import checksums_in_host, roads_of
from tests.kvtransfer.pair import TOKEN, Pair, blocks, config, connected_pair, eventually, key, record
from tests.kvtransfer.test_observer import Heard

ROADS = ("shm", "tcp", "nccl", "cuda_ipc")
SOURCE = PeerId.of(record("prefill-0", Role.PREFILL))
BLOCK_BYTES = 8192
FAR = "h" * 300
"""No name of a host, nor of a socket."""


@pytest.fixture(autouse=True)
def kernel_in_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over device memory are computed here."""
    monkeypatch.setattr("kvtransfer.cuda.device.device_checksums", checksums_in_host)


ADDRESSES: dict[str, list[str]] = {
    "shm": ["", "no\0name", FAR],
    "tcp": ["", "nowhere", "127.0.0.1:x", "127.0.0.1:70000", "127.0.0.1:-1", f"{FAR}:1", "\0:1"],
    "cuda_ipc": [IpcAddress(FAR, bytes(HANDLE_BYTES), 0, 32).encode()],
    "nccl": [NcclAddress(host, 1, 1, 1 << 20, bytes(UNIQUE_ID_BYTES)).encode() for host in (FAR, "\0", "")],
}


@pytest.mark.parametrize(
    ("road", "address"), [(road, address) for road in ROADS for address in ADDRESSES[road]]
)
async def test_address_that_cannot_be_one_is_a_named_fault(road: str, address: str) -> None:
    kit = roads_of(road)
    pool = kit.pool(4, BLOCK_BYTES)
    (sink,) = kit.taking(pool, config(road))
    with pytest.raises(TransferError) as caught:
        await sink.connect(SOURCE, address, b"t" * 32, BLOCK_BYTES)
    assert caught.value.fault in (TransferFault.DISCONNECTED, TransferFault.UNSUPPORTED)
    await sink.close()
    pool.close()


@pytest.mark.parametrize("lease_s", [math.nan, math.inf, -math.inf])
def test_lease_that_is_no_number_has_ended(lease_s: float) -> None:
    asked = Transfer(key("a"), 1, BlockRange(0, 1))
    grant = grant_from_wire(asked, pb.PullResponse(lease_s=lease_s), 7.0)
    assert grant.lease_until_s == 7.0


async def test_state_that_is_not_known_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version's; what was moved is not used on its word."""
    monkeypatch.setattr("kvtransfer.handoffs.service.STATE_TO_WIRE", dict.fromkeys((None, *HandoffState), 99))
    async with connected_pair(config("tcp")) as pair:
        pair.source.offer(key("a"), blocks(1))
        with pytest.raises(TransferError):
            await pair.pull(key("a"), BlockRange(0, 1), blocks(1))


async def connected(pair: Pair, name: str) -> HandoffClient:
    """A second sink, who is agreed with."""
    me = record(name, Role.DECODE)
    client = HandoffClient(me, pair.source_record, TOKEN)
    await client.connect(("tcp",), "", 5.0, (XXH3,))
    return client


@pytest.mark.parametrize("ask", ["commit", "abort"])
async def test_what_is_not_the_sinks_to_end_is_refused_and_counted(ask: str) -> None:
    heard = Heard()
    async with connected_pair(config("tcp"), observer=heard) as pair:
        pair.source.offer(key("a"), blocks(1, 2), KvReady(1, 0))
        before = pair.source_pool.read(blocks(*range(32)))
        pulling = asyncio.create_task(pair.pull(key("a"), BlockRange(0, 2), blocks(3, 4)))
        await eventually(lambda: pair.source.counts().in_flight == 1, within_s=10.0)
        other = await connected(pair, "stranger")
        calls: dict[str, Callable[[], object]] = {
            "commit": lambda: other.commit(key("a"), 1, {1: 1}, 5.0),
            "abort": lambda: other.abort(key("a"), 5.0),
        }
        with pytest.raises(TransferError) as caught:
            await calls[ask]()  # type: ignore[misc]
        assert caught.value.fault is TransferFault.REFUSED
        assert heard.refusals == [TransferFault.REFUSED]
        await other.close()
        pair.source.advance(key("a"), KvReady(2, 4))
        await pulling
        assert pair.sink_pool.read(blocks(3, 4)) == pair.source_pool.read(blocks(1, 2))
        assert pair.source_pool.read(blocks(*range(32))) == before


async def test_transport_that_is_named_often_is_offered_once() -> None:
    async with connected_pair(config("tcp")) as pair:
        who = Introduction(PeerId.of(record("d", Role.DECODE)), "d", ("tcp",) * 1000, "", (XXH3,))
        assert len(pair.source.connect(who).endpoints) == 1


@pytest.mark.parametrize("road", ["shm", "cuda_ipc"])
async def test_sink_that_speaks_on_a_silent_link_is_cut_off_and_counted(road: str) -> None:
    heard = Heard()
    async with connected_pair(config(road), roads=roads_of(road), observer=heard) as pair:
        pair.source.offer(key("a"), blocks(1))
        await pair.pull(key("a"), BlockRange(0, 1), blocks(1))
        endpoint = (await pair.sink._sources.get(pair.source_record)).endpoints[0]
        before = pair.source_pool.read(blocks(*range(32)))
        words = framing.encode_greeting(endpoint.ticket) + b"more"
        framing.check_welcome(await say(link_of(road, endpoint.address), words, hang_up=False))
        await eventually(lambda: heard.link_refusals == [(road, TransferFault.UNSUPPORTED)], within_s=10.0)
        assert pair.source_pool.read(blocks(*range(32))) == before


async def test_sink_that_asks_without_end_is_cut_off_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first request waits for a transfer that nobody granted."""
    monkeypatch.setattr("kvtransfer.posts.MEETING_S", 30.0)
    heard = Heard()
    async with connected_pair(config("nccl"), roads=roads_of("nccl"), observer=heard) as pair:
        pair.source.offer(key("a"), blocks(1))
        await pair.pull(key("a"), BlockRange(0, 1), blocks(1))
        giving, taking = pair.source._transports["nccl"], pair.sink._transports["nccl"]
        assert isinstance(giving, NcclSource)
        ask = framing.encode_header(Header(HeaderKind.ASK, Transfer(key("b"), 9, BlockRange(0, 1)), 1))
        link: socket.socket = taking._pairs[SOURCE].link  # type: ignore[attr-defined]
        await asyncio.get_running_loop().sock_sendall(link, ask * (MAX_ASKS + 2))
        await eventually(lambda: heard.link_refusals == [("nccl", TransferFault.REFUSED)], within_s=10.0)
        await eventually(lambda: not giving._listener._links, within_s=10.0)
