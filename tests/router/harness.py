"""Edge: a real router over stub workers on real sockets, for the tests of this room."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio
import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.stub_script import StubSettings, stub_token
from benchmarks.stub_worker import StubWorker
from router.config import RouterConfig
from router.server import RouterPorts, serve_router
from tandem.slo import SloClass
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc
from tandem.worker import Role, WorkerRecord

DIGEST = "stub"
MODEL = "tiny"
CONTEXT = 256
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = "{% for m in messages %}<|user|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}<|assistant|>"
READY_WITHIN_S = 10.0
PRINTABLE = 97
"""Stub tokens stay below this id, so that each is one printable ASCII character."""


def write_model_folder(folder: Path) -> Path:
    """A byte-level tokenizer without merges: ids 0 to 2 are special, each further id is one byte."""
    vocabulary = {token: token_id for token_id, token in enumerate(SPECIAL)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(vocabulary), "eos_token_id": 0}))
    chat = {"eos_token": SPECIAL[0], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(chat))
    return folder


def printable() -> StubSettings:
    """Settings whose tokens are printable characters."""
    return StubSettings(vocabulary_tokens=PRINTABLE)


class ChangingMembership:
    """A list that tests change."""

    def __init__(self) -> None:
        self.wanted: dict[Role, int] = {}
        self._records: dict[str, WorkerRecord] = {}
        self._changed = asyncio.Event()

    def put(self, record: WorkerRecord) -> None:
        """The worker lives."""
        self._records[record.worker_id] = record
        self._changed.set()

    def drop(self, worker_id: str) -> None:
        """The worker's lease ended."""
        del self._records[worker_id]
        self._changed.set()

    def desired(self) -> Mapping[Role, int]:
        """What a test wants."""
        return self.wanted

    async def watch(self) -> AsyncIterator[tuple[WorkerRecord, ...]]:
        """All workers, after every change."""
        while True:
            self._changed.clear()
            yield tuple(self._records.values())
            await self._changed.wait()


@dataclass
class Cluster:
    """A running router and its stubs by worker id."""

    ports: RouterPorts
    membership: ChangingMembership
    stack: AsyncExitStack
    stop: asyncio.Event
    serving: "asyncio.Task[None]"
    stubs: dict[str, StubWorker] = field(default_factory=dict)

    @property
    def http(self) -> str:
        """Base URL of the HTTP door."""
        return f"http://127.0.0.1:{self.ports.http_port}"

    @property
    def grpc(self) -> str:
        """Address of the gRPC door."""
        return f"127.0.0.1:{self.ports.grpc_port}"

    async def add(
        self,
        name: str,
        role: Role,
        settings: StubSettings | None = None,
        *,
        digest: str = DIGEST,
        incarnation: int = 1,
        port: int = 0,
    ) -> StubWorker:
        """Starts a stub and makes it a member."""
        stub = await self.stack.enter_async_context(
            StubWorker.serving(role, name, digest, settings or printable(), port, incarnation)
        )
        self.stubs[name] = stub
        self.membership.put(stub.record)
        return stub

    async def metrics(self) -> str:
        """What the router tells Prometheus."""
        async with httpx.AsyncClient() as client:
            return (await client.get(f"{self.http}/metrics")).text

    async def ready(self) -> None:
        """Waits (bounded) until the router says that it can serve."""
        async with httpx.AsyncClient() as client:
            await until(lambda: self._is_ready(client))

    async def _is_ready(self, client: httpx.AsyncClient) -> bool:
        return (await client.get(f"{self.http}/ready")).status_code == 200

    async def ask(self, request: pb.GenerateRequest, timeout_s: float = 20.0) -> list[pb.GenerateResponse]:
        """All responses to a request."""
        async with grpc.aio.insecure_channel(self.grpc) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=timeout_s)
            return [response async for response in call]


async def until(condition: Callable[[], object], within_s: float = READY_WITHIN_S) -> None:
    """Asks again until the (maybe awaitable) condition holds; TimeoutError when it does not in time."""
    async with asyncio.timeout(within_s):
        while True:
            answer = condition()
            if asyncio.iscoroutine(answer):
                answer = await answer
            if answer:
                return
            await asyncio.sleep(0.01)


def config_for(folder: Path) -> RouterConfig:
    """Settings for tests: ephemeral ports, and no canary after the first."""
    lenient = SloClass("chat", ttft_s=10.0, tpot_s=10.0, longest_gap_s=10.0)
    strict = SloClass("strict", ttft_s=1e-6, tpot_s=10.0, longest_gap_s=10.0)
    return RouterConfig(
        model_folder=folder,
        model_name=MODEL,
        digest=DIGEST,
        slo_classes=(lenient, strict),
        default_slo_class="chat",
        context_tokens=CONTEXT,
        block_size=4,
        canary_interval_s=60.0,
        grpc_port=0,
        http_port=0,
        drain_timeout_s=2.0,
    )


@asynccontextmanager
async def router_alone(folder: Path, **changes: object) -> AsyncIterator[Cluster]:
    """A router that has no worker yet."""
    config = replace(config_for(folder), **changes)  # type: ignore[arg-type]
    membership, stop = ChangingMembership(), asyncio.Event()
    started: asyncio.Future[RouterPorts] = asyncio.get_running_loop().create_future()
    async with AsyncExitStack() as stack:
        serving = asyncio.create_task(serve_router(config, membership, stop, started.set_result))
        await asyncio.wait((started, serving), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        try:
            yield Cluster(started.result(), membership, stack, stop, serving)
        finally:
            stop.set()
            async with asyncio.timeout(15.0):
                await serving


@asynccontextmanager
async def cluster(
    folder: Path, settings: StubSettings | None = None, pairs: int = 1, **changes: object
) -> AsyncIterator[Cluster]:
    """A ready router with so many prefill and decode stubs, p0, d0, p1 ...; each with settings of its own."""
    async with router_alone(folder, **changes) as made:
        for number in range(pairs):
            for letter, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
                own = replace(settings or StubSettings(), vocabulary_tokens=PRINTABLE, faults=[])
                await made.add(f"{letter}{number}", role, own)
        await made.ready()
        yield made


def expected(prompt: list[int], count: int, sample: int = 0) -> list[int]:
    """What the stubs write for a prompt."""
    return [stub_token(prompt, sample, index, printable()) for index in range(count)]


def text_of(token_ids: list[int]) -> str:
    """What the test tokenizer makes of such tokens."""
    return "".join(chr(ord("!") + token_id - len(SPECIAL)) for token_id in token_ids)


def tokens_of(responses: list[pb.GenerateResponse], sample: int = 0) -> list[int]:
    """All tokens of one sample; fails unless each index came once and in order."""
    tokens: list[int] = []
    for response in responses:
        for chunk in response.chunks:
            if chunk.sample_index == sample:
                assert chunk.first_index == len(tokens)
                tokens += chunk.token_ids
    return tokens
