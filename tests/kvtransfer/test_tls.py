"""TLS on tcp: both sides prove themselves; what fails is named and counted, and another road is taken."""

import asyncio
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kvtransfer.contract import BlockRange, PeerId, TransferConfig
from kvtransfer.tcp import framing
from kvtransfer.tcp.source import TcpSource
from kvtransfer.tcp.tls import Tunnels
from tandem.errors import ConfigError, TransferError, TransferFault
from tandem.worker_config import TlsConfig
from tests.kvtransfer.bad_peers import link_of, say
from tests.kvtransfer.certificates import make_authority, make_worker, needs_openssl
from tests.kvtransfer.pair import Pair, blocks, config, connected_pair, eventually, key
from tests.kvtransfer.test_observer import Heard

pytestmark = needs_openssl

QUICK_S = 0.5
PATIENT_S = 30.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cluster's own."""
    return make_authority(tmp_path_factory.mktemp("authority") / "own")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another cluster's."""
    return make_authority(tmp_path_factory.mktemp("authority") / "other")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, authority: Path) -> TlsConfig:
    """A worker that all trust."""
    return make_worker(tmp_path_factory.mktemp("worker") / "good", authority)


def settings_of(files: TlsConfig | None, *transports: str, patience_s: float = PATIENT_S) -> TransferConfig:
    """A peer is waited for as long as a slow machine needs, unless a test is about that."""
    return replace(config(*(transports or ("tcp",)), connect_timeout_s=patience_s), tls=files)


async def pull_one(pair: Pair, leg: str) -> str:
    """The road that a pull took; what it brought is right."""
    pair.source.offer(key(leg), blocks(5, 7))
    report = await pair.pull(key(leg), BlockRange(0, 2), blocks(6, 1))
    assert pair.sink_pool.read(blocks(6, 1)) == pair.source_pool.read(blocks(5, 7))
    return report.transport


@asynccontextmanager
async def tapped(pair: Pair) -> AsyncIterator[bytearray]:
    """All bytes that go over the pair's data connections, which are new, and end with the sink."""
    source = pair.source._transports["tcp"]
    assert isinstance(source, TcpSource)
    assert source._address is not None
    host, _, port = source._address.rpartition(":")
    heard = bytearray()
    carrying: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            heard.extend(data)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        carrying.update((asyncio.create_task(copy(reader, back)), asyncio.create_task(copy(there, writer))))

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    source._address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield heard
        await pair.sink.close()
        await asyncio.wait(carrying, timeout=5.0)
    finally:
        for task in carrying:
            task.cancel()
        server.close()


async def test_blocks_arrive_and_are_not_on_the_wire_in_the_clear(files: TlsConfig) -> None:
    given, targets = blocks(*range(0, 31, 2)), blocks(*range(31, 0, -2))
    async with connected_pair(settings_of(files), num_blocks=32, block_bytes=400_000) as pair:
        async with tapped(pair) as heard:
            for leg in ("a", "b"):
                pair.source.offer(key(leg), given)
                await pair.pull(key(leg), BlockRange(0, 16), targets)
                assert pair.sink_pool.read(targets) == pair.source_pool.read(given)
        assert len(heard) > 2 * 16 * 400_000
        assert all(block[:64] not in heard for block in pair.source_pool.read(given))
        assert framing.encode_greeting(bytes(32))[:8] not in heard


BAD_SINKS = ("another authority", "expired", "a sink that trusts another", "no TLS")


def files_of_bad_sink(name: str, folder: Path, authority: Path, stranger: Path) -> TlsConfig | None:
    """What a sink shows that the source must not take."""
    if name == "another authority":
        return make_worker(folder / "w", stranger, trusts=authority)
    if name == "expired":
        return make_worker(folder / "w", authority, days=-1)
    if name == "a sink that trusts another":
        return make_worker(folder / "w", authority, trusts=stranger)
    return None


@pytest.mark.parametrize("name", BAD_SINKS)
async def test_sink_that_cannot_prove_itself_is_refused_by_name_and_takes_the_next_road(
    name: str, files: TlsConfig, authority: Path, stranger: Path, tmp_path: Path
) -> None:
    heard = Heard()
    bad = settings_of(files_of_bad_sink(name, tmp_path, authority, stranger), "tcp", "shm")
    async with connected_pair(settings_of(files, "tcp", "shm"), sink_settings=bad, observer=heard) as pair:
        began_s = time.monotonic()
        assert await pull_one(pair, "a") == "shm"
        assert time.monotonic() - began_s < 2.0
        await eventually(lambda: heard.link_refusals == [("tcp", TransferFault.TLS)], 2.0)
        (failure,) = heard.failures
        plain = (TransferFault.TRUNCATED, TransferFault.DISCONNECTED)
        assert failure[0] == "tcp"
        assert failure[1] in (plain if name == "no TLS" else (TransferFault.TLS,))


@pytest.mark.parametrize("name", ["another authority", "expired"])
async def test_source_that_cannot_prove_itself_is_not_trusted(
    name: str, files: TlsConfig, authority: Path, stranger: Path, tmp_path: Path
) -> None:
    heard = Heard()
    bad = settings_of(files_of_bad_sink(name, tmp_path, authority, stranger), "tcp", "shm")
    async with connected_pair(bad, sink_settings=settings_of(files, "tcp", "shm"), observer=heard) as pair:
        assert await pull_one(pair, "a") == "shm"
        assert heard.failures == [("tcp", TransferFault.TLS)]


async def test_source_without_tls_is_not_spoken_to_in_the_clear(files: TlsConfig) -> None:
    heard = Heard()
    plain = settings_of(None, "tcp", "shm")
    async with connected_pair(plain, sink_settings=settings_of(files, "tcp", "shm"), observer=heard) as pair:
        assert await pull_one(pair, "a") == "shm"
        assert heard.failures == [("tcp", TransferFault.TLS)]


async def test_peer_that_never_shakes_hands_costs_the_bound_and_no_more(files: TlsConfig) -> None:
    heard = Heard()
    quick, patient = settings_of(files, patience_s=QUICK_S), settings_of(files)
    async with connected_pair(quick, sink_settings=patient, observer=heard) as pair:
        await pull_one(pair, "before")
        address = (await pair.sink._sources.get(pair.source_record)).endpoints[0].address
        began_s = time.monotonic()
        assert await say(link_of("tcp", address), b"", hang_up=False) == b""
        assert time.monotonic() - began_s < QUICK_S + 1.0
        assert heard.link_refusals == [("tcp", TransferFault.TIMEOUT)]
        await pull_one(pair, "after")


async def test_renewed_files_serve_the_next_connection(
    authority: Path, stranger: Path, tmp_path: Path
) -> None:
    files = make_worker(tmp_path / "w", authority)
    newer = make_worker(tmp_path / "newer", stranger)
    heard = Heard()
    async with connected_pair(settings_of(files), observer=heard) as pair:
        await pull_one(pair, "before")
        shutil.copy(newer.cert, files.cert)
        shutil.copy(newer.key, files.key)
        await pull_one(pair, "kept")
        await pair.sink._transports["tcp"].disconnect(PeerId.of(pair.source_record))
        pair.source.offer(key("anew"), blocks(5))
        with pytest.raises(TransferError) as caught:
            await pair.pull(key("anew"), BlockRange(0, 1), blocks(6))
        assert caught.value.fault is TransferFault.TLS


@pytest.mark.parametrize("missing", ["cert", "key", "ca"])
def test_files_that_cannot_be_used_are_named_at_the_start(files: TlsConfig, missing: str) -> None:
    broken = replace(files, **{missing: Path("/nowhere.pem")})
    with pytest.raises(ConfigError, match=r"nowhere\.pem"):
        Tunnels(broken)


async def test_no_thread_and_no_descriptor_is_left(files: TlsConfig) -> None:
    async with connected_pair(settings_of(files)) as pair:
        await pull_one(pair, "a")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        async with connected_pair(settings_of(files)) as pair:
            await pull_one(pair, "a")
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert not [thread for thread in threading.enumerate() if thread.name == "kv-tls"]


class TestTunnel:
    """What a plain socket would do, the near ends of two tunnels do."""

    @staticmethod
    def ends(files: TlsConfig, tunnels: Tunnels) -> tuple[socket.socket, socket.socket]:
        """Both near ends of one connection."""
        made = socket.socketpair()
        begun = [tunnels.begin(end, server, 5.0) for end, server in zip(made, (True, False), strict=True)]
        first, second = (tunnel.opened.result(10.0) for tunnel in begun)
        first.settimeout(10.0)
        second.settimeout(10.0)
        return first, second

    def test_bytes_go_both_ways_at_once_in_any_sizes(self, files: TlsConfig) -> None:
        tunnels = Tunnels(files)
        ends = self.ends(files, tunnels)
        chance = random.Random(3)
        said = [chance.randbytes(3_000_000), chance.randbytes(2_000_001)]
        heard = [bytearray(), bytearray()]

        def say_all(number: int) -> None:
            ends[number].sendall(said[number])

        def hear_all(number: int) -> None:
            while len(heard[number]) < len(said[1 - number]):
                heard[number] += ends[number].recv(chance.randrange(1, 200_000))

        threads = [threading.Thread(target=do, args=(n,)) for n in (0, 1) for do in (say_all, hear_all)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
        assert [bytes(part) for part in heard] == said[::-1]
        for end in ends:
            end.close()
        tunnels.close()

    def test_what_was_said_before_closing_still_arrives_and_then_the_end(self, files: TlsConfig) -> None:
        tunnels = Tunnels(files)
        first, second = self.ends(files, tunnels)
        first.sendall(b"x" * 300_000)
        first.close()
        heard = bytearray()
        while part := second.recv(65536):
            heard += part
        assert heard == b"x" * 300_000
        second.close()
        tunnels.close()

    def test_closing_is_bounded_when_the_peer_takes_nothing(self, files: TlsConfig) -> None:
        tunnels = Tunnels(files)
        first, second = self.ends(files, tunnels)
        first.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                first.send(bytes(1 << 20))
        began_s = time.monotonic()
        first.close()
        tunnels.close()
        assert time.monotonic() - began_s < 3.0
        assert not [thread for thread in threading.enumerate() if thread.name == "kv-tls"]
        second.close()
