"""A prefill and a decode worker with a tiny random model in this process, and a router's hand on them."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc.aio

from decode_worker.service import DecodeWorker
from engine.worker_process.worker import Worker
from prefill_worker.service import PrefillWorker
from tandem import grpc_edge
from tandem.ids import Incarnation, WorkerId
from tandem.sampling import SamplingParams
from tandem.v1 import worker_pb2 as wpb
from tandem.v1 import worker_pb2_grpc
from tandem.wire import address_to_wire, sampling_to_wire
from tandem.worker import Role
from tandem.worker_config import WorkerConfig
from tests.engine.tiny_models import SIZES, family_configs, random_model

TOKEN = "cluster-token"
WAIT_S = 20.0
VOCABULARY: int = SIZES["vocab_size"]


def save_tiny_model(folder: Path) -> Path:
    """A random Llama in a Hugging Face folder."""
    random_model(family_configs()["llama"]).save_pretrained(folder)
    return folder


def worker_config(folder: Path, role: Role, **changes: object) -> WorkerConfig:
    """A small worker of one role."""
    settings: dict[str, Any] = {"pool_blocks": 64, "block_size": 4, "token_budget": 16, "threads": 1}
    settings |= changes
    return WorkerConfig(WorkerId(role.value), Incarnation(1), role, folder, "tiny", **settings)


class Hand:
    """One Attach stream, as a router holds it; remembers all news that is no load and no cache event."""

    def __init__(self, worker: Worker[Any], stub: Any) -> None:
        self.worker = worker
        self._call = stub.Attach(metadata=grpc_edge.bearer(TOKEN))
        self.news: list[wpb.WorkerMessage] = []
        self._changed = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    async def attach(self) -> None:
        """Says hello and starts to read."""
        hello = wpb.RouterHello(router_id="test", digest=self.worker.record.digest)
        await self._call.write(wpb.RouterMessage(hello=hello))
        self._reading = asyncio.create_task(self._read())
        await self.until("welcome")

    async def send(self, message: wpb.RouterMessage) -> None:
        """Sends an instruction."""
        await self._call.write(message)

    async def until(self, body: str, count: int = 1) -> list[wpb.WorkerMessage]:
        """Waits for so many messages of a kind; all of that kind so far."""
        async with asyncio.timeout(WAIT_S):
            while True:
                found = [message for message in self.news if message.WhichOneof("body") == body]
                if len(found) >= count:
                    return found
                self._changed.clear()
                await self._changed.wait()

    async def until_finished(self, samples: int) -> dict[int, list[int]]:
        """Waits until so many samples ended; the tokens of each, checked to come once and in order."""
        async with asyncio.timeout(WAIT_S):
            while True:
                tokens, ended = self.tokens()
                if ended >= samples:
                    return tokens
                self._changed.clear()
                await self._changed.wait()

    def tokens(self) -> tuple[dict[int, list[int]], int]:
        """Tokens of each sample so far, and how many samples ended."""
        tokens: dict[int, list[int]] = {}
        ended = 0
        for message in self.news:
            for entry in message.step.sequences:
                tokens.setdefault(entry.sample_index, []).extend(entry.token_ids)
                ended += bool(entry.finish_reason)
        return tokens, ended

    async def detach(self) -> None:
        """Breaks the stream."""
        self._call.cancel()
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        while (message := await self._call.read()) is not grpc.aio.EOF:
            if message.WhichOneof("body") not in ("load", "cache"):
                self.news.append(message)
            self._changed.set()


@dataclass(frozen=True)
class Pair:
    """Both workers and a hand on each."""

    prefill: Hand
    decode: Hand

    async def settled(self) -> None:
        """Waits until no blocks are held on either side."""
        async with asyncio.timeout(WAIT_S):
            for hand in (self.prefill, self.decode):
                while hand.worker.load().allocated_blocks:
                    await asyncio.sleep(0.01)
                assert hand.worker.load().referenced_blocks == 0


@asynccontextmanager
async def worker_pair(
    folder: Path,
    transport: str,
    *,
    overlap_min_tokens: int | None = None,
    kv_dtypes: tuple[str | None, str | None] = (None, None),
    both: Mapping[str, object] = MappingProxyType({}),
    **decode_changes: object,
) -> AsyncIterator[Pair]:
    """Both workers, attached; `kv_dtypes`: the prefill, the decode worker's; `both`: settings of the two."""
    async with AsyncExitStack() as stack:
        hands = []
        changes: dict[Role, dict[str, object]] = {
            Role.PREFILL: {"overlap_min_tokens": overlap_min_tokens, "kv_dtype": kv_dtypes[0]},
            Role.DECODE: {**decode_changes, "kv_dtype": kv_dtypes[1]},
        }
        for role, kind in ((Role.PREFILL, PrefillWorker), (Role.DECODE, DecodeWorker)):
            config = worker_config(folder, role, transports=(transport,), **{**both, **changes[role]})
            worker: Worker[Any] = await stack.enter_async_context(kind.open(config, TOKEN))
            channel = await stack.enter_async_context(grpc_edge.channel(worker.record.address))
            hand = Hand(worker, worker_pb2_grpc.WorkerServiceStub(channel))
            await hand.attach()
            stack.push_async_callback(hand.detach)
            hands.append(hand)
        yield Pair(*hands)


def start_prefill(
    prompt: list[int], params: SamplingParams, samples: tuple[int, ...] = (0,), leg_id: str = "leg"
) -> wpb.RouterMessage:
    """The instruction to read a prompt."""
    return wpb.RouterMessage(
        start_prefill=wpb.StartPrefill(
            leg_id=leg_id,
            request_id="request",
            token_ids=prompt,
            prompt_tokens=len(prompt),
            sample_indices=samples,
            sampling=sampling_to_wire(params),
            remaining_s=60.0,
        )
    )


def prefetch_kv(
    pair: Pair, prompt: list[int], leg_id: str = "leg", epoch: int = 1, remaining_s: float = 60.0
) -> wpb.RouterMessage:
    """The instruction to fetch the KV of one sample while the prompt is read."""
    return wpb.RouterMessage(
        prefetch_kv=wpb.PrefetchKv(
            leg_id=leg_id,
            request_id="request",
            token_ids=prompt,
            prompt_tokens=len(prompt),
            sample_indices=[0],
            remaining_s=remaining_s,
            source=address_to_wire(pair.prefill.worker.record),
            epoch=epoch,
        )
    )


def start_decode(
    pair: Pair,
    prompt: list[int],
    firsts: dict[int, int],
    params: SamplingParams,
    leg_id: str = "leg",
    epoch: int = 1,
) -> wpb.RouterMessage:
    """The instruction to fetch the KV and go on."""
    samples = [wpb.SampleStart(sample_index=index, token_ids=[token]) for index, token in firsts.items()]
    return wpb.RouterMessage(
        start_decode=wpb.StartDecode(
            leg_id=leg_id,
            request_id="request",
            token_ids=prompt,
            prompt_tokens=len(prompt),
            samples=samples,
            sampling=sampling_to_wire(params),
            remaining_s=60.0,
            source=address_to_wire(pair.prefill.worker.record),
            epoch=epoch,
        )
    )
