"""Edge: asks a live pair of workers, keeps either at work, and reads how many steps they took."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from benchmarks.workload import FIRST_PLAIN_TOKEN
from tandem.client import AsyncTandemClient, GenerateOptions
from tandem.errors import TandemError
from tandem.generation import SamplingOptions, Timeline, TokenPrompt
from tandem.wire import ROLE_FROM_WIRE
from tandem.worker import Role

MOST_OUTPUT_TOKENS = 1500
"""Enough for a batch whose prompts are read one after the other beside a busy neighbour."""

REQUEST_TIMEOUT_S = 300.0
_STEP_SUM, _STEP_COUNT = "tandem_worker_step_seconds_sum", "tandem_worker_step_seconds_count"


@dataclass(frozen=True, slots=True)
class Answer:
    """When it was asked and when its tokens came, on this process's clock, and the router's timeline."""

    sent_s: float
    arrived_s: tuple[float, ...]
    timeline: Timeline


@dataclass(frozen=True, slots=True)
class Steps:
    """Of a worker since its start."""

    seconds: float
    count: float


class Stream:
    """When the tokens of one answer came, on this process's clock; somebody may wait for a number of them."""

    def __init__(self) -> None:
        self.arrived_s: list[float] = []
        self._wanted = 0
        self._reached = asyncio.Event()

    def came(self, tokens: int) -> None:
        """Notes tokens that came together."""
        self.arrived_s += [time.perf_counter()] * tokens
        if len(self.arrived_s) >= self._wanted:
            self._reached.set()

    async def reaches(self, tokens: int) -> None:
        """Waits until so many have come. Raises TimeoutError when that takes too long."""
        self._wanted = tokens
        if len(self.arrived_s) < tokens:
            self._reached.clear()
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await self._reached.wait()


@dataclass(slots=True)
class Readers:
    """Askers of prompts, one answer after the other each; `answers` counts what they have had."""

    answers: int = 0


class LiveAsker:
    """Asks one cluster of one prefill and one decode worker that nobody else uses."""

    def __init__(self, client: AsyncTandemClient, http: httpx.AsyncClient, seed: int = 0) -> None:
        self._client = client
        self._http = http
        self._random = random.Random(seed)
        self._metrics: dict[Role, str] = {}
        self._vocabulary = 0

    async def meet(self) -> None:
        """Learns whom it asks; call it first. Raises TandemError."""
        status, models = await self._client.status(), await self._client.models()
        self._vocabulary = models[0].vocabulary_tokens
        self._metrics = {ROLE_FROM_WIRE[one.role]: one.metrics_address for one in status.workers}
        if len(status.workers) != 2 or not all(
            self._metrics.get(role) for role in (Role.PREFILL, Role.DECODE)
        ):
            raise TandemError("A live profile needs one prefill and one decode worker that serve metrics.")

    async def ask(self, prompt_tokens: int, output_tokens: int, stream: Stream | None = None) -> Answer:
        """One request with a prompt that nobody asked before. Raises TandemError."""
        ids = tuple(self._random.randrange(FIRST_PLAIN_TOKEN, self._vocabulary) for _ in range(prompt_tokens))
        sampling = SamplingOptions(
            temperature=0.0, max_tokens=output_tokens, min_tokens=output_tokens, ignore_eos=True
        )
        options = GenerateOptions(sampling=sampling, timeout_s=REQUEST_TIMEOUT_S)
        watched = stream or Stream()
        timeline = None
        sent_s = time.perf_counter()
        async for update in self._client.generate(TokenPrompt(ids), options):
            watched.came(sum(len(delta.token_ids) for delta in update.deltas))
            timeline = update.timeline or timeline
        if timeline is None or not watched.arrived_s:
            raise TandemError("An answer ended without its tokens or its timeline.")
        return Answer(sent_s, tuple(watched.arrived_s), timeline)

    async def steps(self, role: Role) -> Steps:
        """All steps of a worker so far."""
        answer = await self._http.get(f"http://{self._metrics[role]}/metrics")
        values = dict(
            line.rsplit(" ", 1)
            for line in answer.text.splitlines()
            if line.startswith((_STEP_SUM, _STEP_COUNT))
        )
        return Steps(float(values[_STEP_SUM]), float(values[_STEP_COUNT]))

    @asynccontextmanager
    async def decoding(self, batch: int, context: int) -> AsyncIterator[list[Stream]]:
        """Keeps the decode worker at work; begins once so many sequences are in its batch."""
        streams = [Stream() for _ in range(batch)]
        asking = [asyncio.create_task(self.ask(context, MOST_OUTPUT_TOKENS, stream)) for stream in streams]
        async with _ended_after(asking):
            for stream in streams:
                await stream.reaches(2)
            yield streams
            if any(task.done() for task in asking):
                raise TandemError("A sequence that was to be decoded meanwhile ended too early.")

    @asynccontextmanager
    async def reading(self, askers: int, prompt_tokens: int, output_tokens: int) -> AsyncIterator[Readers]:
        """Keeps the prefill worker at work with prompts that want a few tokens."""
        readers = Readers()

        async def read() -> None:
            while True:
                await self.ask(prompt_tokens, output_tokens)
                readers.answers += 1

        async with _ended_after([asyncio.create_task(read()) for _ in range(askers)]):
            yield readers


@asynccontextmanager
async def _ended_after(tasks: Sequence["asyncio.Task[object]"]) -> AsyncIterator[None]:
    """Cancels and awaits; raises what one of them died of."""
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
