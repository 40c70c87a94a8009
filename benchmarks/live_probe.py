"""Edge: measures a live pair of workers through the front door: steps, hand-offs and what the door adds.

Every figure is taken twice: with the other worker idle, and with it at work. The requests are the probe's
own, so that nothing is fitted to a load that is forecast later.
"""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from benchmarks.workload import FIRST_PLAIN_TOKEN
from planner.live_profile import LiveProfile
from planner.profile_file import MeasuredStep, MeasuredTransfer
from tandem.client import AsyncTandemClient, GenerateOptions
from tandem.errors import TandemError
from tandem.generation import SamplingOptions, Timeline, TokenPrompt
from tandem.wire import ROLE_FROM_WIRE
from tandem.worker import Role

BLOCK_TOKENS = 16
PROMPT_TOKENS = (16, 32, 64, 128, 256, 512)
BATCHES = (1, 2, 4, 8, 16)
CONTEXTS = (32, 192)
STEPS = 32
"""Steps that a batch is timed over."""

MOST_OUTPUT_TOKENS = 1500
"""Enough for a batch whose prompts are read one after the other beside a busy neighbour."""

BUSY_STREAMS = 6
BUSY_PROMPTS, BUSY_PROMPT_TOKENS = 2, 128
REQUEST_TIMEOUT_S = 300.0
_STEP_SUM, _STEP_COUNT = "tandem_worker_step_seconds_sum", "tandem_worker_step_seconds_count"


@dataclass(frozen=True, slots=True)
class Answer:
    """Time to the first token on this process's clock, and the router's timeline."""

    ttft_s: float
    timeline: Timeline


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


@dataclass(frozen=True, slots=True)
class PromptTimes:
    """Medians of single prompts: the step, what the front door adds to it, the hand-off and its bytes."""

    tokens: int
    step_s: float
    door_s: float
    handoff_s: float
    handoff_bytes: int


class LiveProbe:
    """Asks one cluster of one prefill and one decode worker that nobody else uses."""

    def __init__(self, client: AsyncTandemClient, http: httpx.AsyncClient, runs: int, seed: int = 0) -> None:
        self._client = client
        self._http = http
        self._runs = runs
        self._random = random.Random(seed)
        self._metrics: dict[Role, str] = {}
        self._vocabulary = 0

    async def profile(self) -> LiveProfile:
        """Measures everything; takes some minutes. Raises TandemError."""
        await self._meet()
        await self.ask(BUSY_PROMPT_TOKENS, 4)
        prompts = [await self._prompt(tokens) for tokens in PROMPT_TOKENS]
        batches = [await self._batch(*shape) for shape in _shapes()]
        async with self._decoding(BUSY_STREAMS, BLOCK_TOKENS):
            prompts_in_company = [await self._prompt(tokens) for tokens in PROMPT_TOKENS]
        async with self._reading():
            batches_in_company = [await self._batch(*shape) for shape in _shapes()]
        return LiveProfile(
            version=1,
            kind="tandem profile",
            points=(*map(_prompt_point, prompts), *batches),
            transfers=tuple(map(_transfer, prompts)),
            block_size=BLOCK_TOKENS,
            kv_bytes_per_token=prompts[-1].handoff_bytes // prompts[-1].tokens,
            in_company=(*map(_prompt_point, prompts_in_company), *batches_in_company),
            in_company_transfers=tuple(map(_transfer, prompts_in_company)),
            front_door_s=statistics.median(one.door_s for one in prompts),
            in_company_front_door_s=statistics.median(one.door_s for one in prompts_in_company),
        )

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
        return Answer(watched.arrived_s[0] - sent_s, timeline)

    async def _meet(self) -> None:
        status, models = await self._client.status(), await self._client.models()
        self._vocabulary = models[0].vocabulary_tokens
        self._metrics = {ROLE_FROM_WIRE[one.role]: one.metrics_address for one in status.workers}
        if len(status.workers) != 2 or not all(
            self._metrics.get(role) for role in (Role.PREFILL, Role.DECODE)
        ):
            raise TandemError("A live profile needs one prefill and one decode worker that serve metrics.")

    async def _prompt(self, tokens: int) -> PromptTimes:
        steps_s, doors_s, handoffs_s, moved = [], [], [], 0
        for _ in range(self._runs):
            before_s, before = await self._steps(Role.PREFILL)
            answer = await self.ask(tokens, 3)
            after_s, after = await self._steps(Role.PREFILL)
            if after <= before:
                raise TandemError("The prefill worker counted no step for a prompt.")
            steps_s.append(after_s - before_s)
            doors_s.append(answer.ttft_s - steps_s[-1])
            handoffs_s.append(answer.timeline.handoff_s)
            moved = answer.timeline.handoff_bytes
        median = statistics.median
        return PromptTimes(tokens, median(steps_s), median(doors_s), median(handoffs_s), moved)

    async def _batch(self, batch: int, context: int) -> MeasuredStep:
        """The mean step while all sequences of a batch decode."""
        async with self._decoding(batch, context) as streams:
            first = len(streams[0].arrived_s)
            await streams[0].reaches(first + STEPS)
            last = len(streams[0].arrived_s)
            # The streams are at the same step, some tokens apart by when they joined.
            contexts = sum(context + len(stream.arrived_s) - (last - first) // 2 for stream in streams)
            arrived_s = streams[0].arrived_s
            return MeasuredStep(
                decode_batch=batch,
                decode_context_tokens=contexts,
                seconds=(arrived_s[last - 1] - arrived_s[first - 1]) / (last - first),
                runs=last - first,
            )

    async def _steps(self, role: Role) -> tuple[float, float]:
        """Seconds and number of all steps of a worker."""
        answer = await self._http.get(f"http://{self._metrics[role]}/metrics")
        values = dict(
            line.rsplit(" ", 1)
            for line in answer.text.splitlines()
            if line.startswith((_STEP_SUM, _STEP_COUNT))
        )
        return float(values[_STEP_SUM]), float(values[_STEP_COUNT])

    @asynccontextmanager
    async def _decoding(self, batch: int, context: int) -> AsyncIterator[list[Stream]]:
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
    async def _reading(self) -> AsyncIterator[None]:
        """Keeps the prefill worker at work with prompts that want one token."""

        async def read() -> None:
            while True:
                await self.ask(BUSY_PROMPT_TOKENS, 1)

        async with _ended_after([asyncio.create_task(read()) for _ in range(BUSY_PROMPTS)]):
            yield


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


def _shapes() -> list[tuple[int, int]]:
    return [(batch, context) for context in CONTEXTS for batch in BATCHES]


def _prompt_point(times: PromptTimes) -> MeasuredStep:
    return MeasuredStep(prompts=((times.tokens, 0),), seconds=times.step_s)


def _transfer(times: PromptTimes) -> MeasuredTransfer:
    return MeasuredTransfer(transport="live", bytes=times.handoff_bytes, seconds=times.handoff_s)
