"""KV goes through a wire codec on any transport; both ends hold what the codec gives, and no block leaks."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvtransfer.codecs.contract import BlockShape, Codec
from kvtransfer.codecs.registry import codec_named
from kvtransfer.codecs.thresholds import calibrate
from kvtransfer.coded_sink import CodedSink
from kvtransfer.coded_source import CodedSource
from kvtransfer.contract import BlockRange, HandoffKey, KvReady
from kvtransfer.handoffs.service import HandoffServicer
from kvtransfer.handoffs.words import ReleaseReason
from kvtransfer.staging import StagedMemory
from tandem import grpc_edge
from tandem.digest import compatibility_digest
from tandem.errors import ConfigError, TransferError, TransferFault
from tandem.ids import BlockId
from tandem.v1.worker_pb2_grpc import add_HandoffServiceServicer_to_server
from tandem.worker import Role, WorkerRecord
from tests.kvtransfer.pair import TOKEN, Pool, blocks, config, eventually, key, outcome_of, record

torch.set_num_threads(1)
SHAPE = BlockShape(layers=2, block_size=16, kv_heads=2, head_dim=16, dtype=torch.float32)
NUM_BLOCKS = 24
CODECS = ("identity", "fp8", "int8", "oaken")


def tensor_of(pool: Pool) -> Tensor:
    """The pool's blocks; does not outlive the expression it is used in."""
    return torch.frombuffer(pool.window(0, NUM_BLOCKS * SHAPE.block_bytes), dtype=SHAPE.dtype).view(
        NUM_BLOCKS, *SHAPE.dimensions
    )


def codec_of(name: str, folder: Path) -> Codec:
    numbers = torch.randn((NUM_BLOCKS, *SHAPE.dimensions), generator=torch.Generator().manual_seed(1))
    thresholds = folder / "thresholds.json"
    calibrate(numbers, SHAPE).save(thresholds)
    return codec_named(name, SHAPE, thresholds if name == "oaken" else None)


@dataclass(slots=True)
class CodedPair:
    """Both ends of a hand-off in encoded form."""

    source_pool: Pool
    sink_pool: Pool
    source: CodedSource
    sink: CodedSink
    source_record: WorkerRecord
    released: list[tuple[HandoffKey, ReleaseReason]]

    async def pull(self, leg: str, wanted: BlockRange, targets: tuple[BlockId, ...]) -> int:
        """Bytes that moved."""
        report = await self.sink.pull(key(leg), self.source_record, wanted, targets, 0, 20.0)
        assert report.decode_s > 0
        return report.moved_bytes


@asynccontextmanager
async def coded_pair(codec: Codec, *transports: str, sink_digest: str = "d") -> AsyncIterator[CodedPair]:
    """A source and a sink over real sockets."""
    source_pool, sink_pool = Pool(NUM_BLOCKS, SHAPE.block_bytes, 2), Pool(NUM_BLOCKS, SHAPE.block_bytes, 2)
    tensor_of(source_pool).copy_(
        torch.randn((NUM_BLOCKS, *SHAPE.dimensions), generator=torch.Generator().manual_seed(2))
    )
    settings = config(*transports)
    released: list[tuple[HandoffKey, ReleaseReason]] = []
    with StagedMemory(source_pool, SHAPE, codec) as giving, StagedMemory(sink_pool, SHAPE, codec) as taking:
        me = record("prefill-0", Role.PREFILL)
        source = CodedSource(me, giving, settings, time.monotonic, lambda *end: released.append(end))
        await source.start()
        server = grpc_edge.server(TOKEN)
        add_HandoffServiceServicer_to_server(HandoffServicer(source), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        sink = CodedSink(
            record("decode-0", Role.DECODE, digest=sink_digest), taking, settings, time.monotonic, TOKEN
        )
        try:
            there = record("prefill-0", Role.PREFILL, f"127.0.0.1:{port}")
            yield CodedPair(source_pool, sink_pool, source, sink, there, released)
        finally:
            await sink.close()
            await source.close()
            await server.stop(grace=0)
    source_pool.close()
    sink_pool.close()


def decoded(codec: Codec, numbers: Tensor) -> Tensor:
    """What a round trip through the codec gives."""
    encoded = torch.empty((numbers.shape[0], codec.encoded_bytes), dtype=torch.uint8)
    codec.encode(numbers, encoded)
    result = torch.empty_like(numbers)
    codec.decode(encoded, result)
    return result


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("name", CODECS)
async def test_the_sink_holds_what_the_codec_gives_back(name: str, transport: str, tmp_path: Path) -> None:
    codec = codec_of(name, tmp_path)
    given, targets = blocks(3, 1, 7, 20, 11), blocks(0, 9, 4, 2, 23)
    async with coded_pair(codec, transport) as pair:
        pair.source.offer(key("leg"), given)
        moved = await pair.pull("leg", BlockRange(0, 5), targets)
        assert moved == 5 * codec.encoded_bytes
        expected = decoded(codec, tensor_of(pair.source_pool)[list(given)])
        assert torch.equal(tensor_of(pair.sink_pool)[list(targets)], expected)
        untouched = [block for block in range(NUM_BLOCKS) if block not in targets]
        assert not tensor_of(pair.sink_pool)[untouched].any()
        assert pair.released == [(key("leg"), ReleaseReason.COMMITTED)]


@pytest.mark.parametrize("name", CODECS)
async def test_a_growing_offer_is_encoded_as_it_grows(name: str, tmp_path: Path) -> None:
    codec = codec_of(name, tmp_path)
    given = blocks(5, 6, 7, 8, 9, 10)
    async with coded_pair(codec, "tcp", "shm") as pair:
        late = tensor_of(pair.source_pool)[8].clone()
        tensor_of(pair.source_pool)[8].zero_()
        pair.source.offer(key("leg"), given, KvReady(0, 0))
        pair.source.advance(key("leg"), KvReady(2, 0))
        pair.source.advance(key("leg"), KvReady(2, 1))
        tensor_of(pair.source_pool)[8].copy_(late)
        pair.source.advance(key("leg"), KvReady(5, 2))
        await pair.pull("leg", BlockRange(0, 6), given)
        expected = decoded(codec, tensor_of(pair.source_pool)[list(given)])
        assert torch.equal(tensor_of(pair.sink_pool)[list(given)], expected)


async def test_a_sink_that_has_the_first_blocks_pulls_the_rest(tmp_path: Path) -> None:
    codec = codec_of("int8", tmp_path)
    async with coded_pair(codec, "shm") as pair:
        pair.source.offer(key("leg"), blocks(0, 1, 2, 3))
        assert await pair.pull("leg", BlockRange(3, 1), blocks(8)) == codec.encoded_bytes
        pair.source.offer(key("held"), blocks(0, 1))
        assert await pair.pull("held", BlockRange(2, 0), ()) == 0
        await eventually(lambda: len(pair.released) == 2, 2.0)


async def test_blocks_come_back_once_and_only_when_no_thread_encodes_them(tmp_path: Path) -> None:
    async with coded_pair(codec_of("fp8", tmp_path), "shm") as pair:
        pair.source.offer(key("leg"), blocks(0, 1, 2, 3))
        pair.source.withdraw(key("leg").leg_id)
        assert pair.released == []
        await eventually(lambda: bool(pair.released), 2.0)
        pair.source.advance(key("leg"), KvReady(4, 2))
        pair.source.offer(key("leg", 2), blocks(0, 1, 2, 3))
        await pair.source.close()
        assert pair.released == [(key("leg"), ReleaseReason.WITHDRAWN), (key("leg", 2), ReleaseReason.CLOSED)]


async def test_a_sink_of_another_codec_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    async with coded_pair(codec_of("fp8", tmp_path), "shm", "tcp", sink_digest="other") as pair:
        pair.source.offer(key("leg"), blocks(0))
        failure = await outcome_of(pair.pull("leg", BlockRange(0, 1), blocks(0)))
        assert isinstance(failure, TransferError)
        assert failure.fault is TransferFault.DIGEST
        assert not tensor_of(pair.sink_pool).any()


def test_codec_and_thresholds_are_in_the_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text("1")
    second.write_text("2")
    plain = compatibility_digest(tmp_path, "float32", 16)
    assert plain == compatibility_digest(tmp_path, "float32", 16, "identity")
    digests = {plain, compatibility_digest(tmp_path, "float32", 16, "fp8")}
    digests |= {compatibility_digest(tmp_path, "float32", 16, "oaken", path) for path in (first, second)}
    assert len(digests) == 4
    with pytest.raises(ConfigError, match="codec_thresholds"):
        compatibility_digest(tmp_path, "float32", 16, "oaken", tmp_path / "missing.json")


def test_a_codec_of_another_shape_than_the_pool_is_refused() -> None:
    pool = Pool(2, SHAPE.block_bytes // 2)
    with pytest.raises(ConfigError, match="fp8"):
        StagedMemory(pool, SHAPE, codec_named("fp8", SHAPE))
    pool.close()
