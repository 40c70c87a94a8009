"""Edge: the giving process of `tandem bench kv`: `python -m benchmarks.kv_source`.

Reads a SourceSpec as one line of JSON on stdin and answers with SourceFacts. Then reads an Order on each
line, carries it out and answers with an empty line; ends with stdin.
"""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import TypeAdapter

from benchmarks.kv_layouts import BLOCK_SIZE, Layout, Shape
from benchmarks.kv_times import Road
from benchmarks.raw_tcp import raw_source
from engine.kv.kv_cache import KvCache
from kvtransfer.contract import HandoffKey
from kvtransfer.handoffs.service import HandoffServicer
from kvtransfer.handoffs.source import HandoffSource
from tandem import grpc_edge
from tandem.ids import BlockId, Incarnation, LegId, WorkerId
from tandem.logs import configure_logging
from tandem.v1.worker_pb2_grpc import add_HandoffServiceServicer_to_server
from tandem.worker import Role, WorkerRecord

DIGEST = "bench"

PATTERN_BYTES = 1 << 20
"""Bytes of the random pattern with which pools are filled; prime offsets keep blocks apart."""


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """The pool, and the roads that are served, each as a worker of its own."""

    layout: Layout
    roads: tuple[Road, ...]


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Where the roads are served, in their order, and the port of the raw stream."""

    workers: tuple[WorkerRecord, ...]
    raw_port: int


@dataclass(frozen=True, slots=True)
class Order:
    """Offer blocks under a leg's name on one road."""

    road: int
    leg: str
    blocks: tuple[int, ...]


SPEC = TypeAdapter(SourceSpec)
FACTS = TypeAdapter(SourceFacts)
ORDER = TypeAdapter(Order)


def make_pool(shape: Shape, num_blocks: int) -> KvCache:
    """The engine's own pool, filled with bytes that differ from block to block."""
    pool = KvCache(shape.model(), num_blocks, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    flat = pool.pool.view(torch.uint8).reshape(-1).numpy()
    pattern = np.random.default_rng(0).integers(0, 256, PATTERN_BYTES - 3, dtype=np.uint8)
    for begin in range(0, flat.size, pattern.size):
        part = flat[begin : begin + pattern.size]
        part[:] = pattern[: part.size]
    return pool


@asynccontextmanager
async def served(road: Road, pool: KvCache) -> AsyncIterator[tuple[HandoffSource, WorkerRecord]]:
    """A source behind a gRPC server of its own on loopback."""
    name = WorkerId(f"source-{road.transport}-{'checked' if road.checksum else 'plain'}")
    me = WorkerRecord(name, Incarnation(1), Role.PREFILL, "", DIGEST)
    source = HandoffSource(me, pool, road.config(), time.monotonic, lambda _key, _reason: None)
    async with sourced(source) as record:
        yield source, record


@asynccontextmanager
async def sourced(source: HandoffSource) -> AsyncIterator[WorkerRecord]:
    """Starts a source behind a gRPC server; its record, with the address."""
    await source.start()
    server = grpc_edge.server(None)
    add_HandoffServiceServicer_to_server(HandoffServicer(source), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield replace(source.me, address=f"127.0.0.1:{port}")
    finally:
        await source.close()
        await server.stop(grace=0)


def _orders() -> Iterator[Order]:
    for line in sys.stdin.buffer:
        yield ORDER.validate_json(line)


async def _serve(spec: SourceSpec) -> None:
    async with AsyncExitStack() as stack:
        pool = stack.enter_context(make_pool(spec.layout.shape, spec.layout.pool_blocks))
        port = stack.enter_context(raw_source(max(spec.layout.counts) * pool.block_bytes))
        made = [await stack.enter_async_context(served(road, pool)) for road in spec.roads]
        facts = SourceFacts(tuple(record for _, record in made), port)
        print(FACTS.dump_json(facts).decode(), flush=True)
        orders = _orders()
        while (order := await asyncio.to_thread(next, orders, None)) is not None:
            blocks = [BlockId(block) for block in order.blocks]
            made[order.road][0].offer(HandoffKey(LegId(order.leg), 1), blocks)
            print(flush=True)


def main() -> None:
    """Serves until stdin ends."""
    # Answers alone go to stdout.
    configure_logging(logging.WARNING)
    asyncio.run(_serve(SPEC.validate_json(sys.stdin.buffer.readline())))


if __name__ == "__main__":
    main()
