"""Edge: what is left of a hand-off when its KV moves while the prompt is read, over a slow link.

`python -m benchmarks.overlap [CODEC]` measures it alone; `tandem bench kv` has it beside the rest.

Two worker processes and a router's hand on them. Per round one prompt is handed over as it is read and one
afterwards; both counted from the end of the prefill (its first token is here) until the KV landed.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass

from benchmarks.kv_times import OverlapFigures
from benchmarks.processes import exchange, running_module
from router.worker_client import WorkerLink
from router.worker_key import WorkerKey
from tandem.errors import TandemError
from tandem.ids import Incarnation, WorkerId
from tandem.sampling import SamplingParams
from tandem.v1 import worker_pb2 as wpb
from tandem.wire import address_to_wire, sampling_to_wire
from tandem.worker import Role, WorkerRecord

SILENCE_S = 10.0
STEP_TIMEOUT_S = 60.0
PROMPT_TOKENS = 1200
LINK_BYTES_PER_S = 125e6
"""1 Gbit/s."""

PARAMS = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Handover:
    """One prompt: seconds until its first token, and from there until its KV had landed."""

    prefill_s: float
    landed_s: float
    moved_bytes: int


class _Listener:
    """What one worker says, in order."""

    def __init__(self) -> None:
        self.attached_now = asyncio.Event()
        self._news: asyncio.Queue[wpb.WorkerMessage] = asyncio.Queue()

    def attached(self, record: WorkerRecord, welcome: wpb.WorkerWelcome) -> None:
        """The worker can be sent legs."""
        self.attached_now.set()

    def heard(self, key: WorkerKey, message: wpb.WorkerMessage) -> None:
        """Load and cache news are of no interest here."""
        if message.WhichOneof("body") not in ("load", "cache", "pong"):
            self._news.put_nowait(message)

    def lost(self, key: WorkerKey, reason: str) -> None:
        """A worker that is lost answers no more: the wait for its news ends it."""
        self.attached_now.clear()

    async def until(self, body: str) -> wpb.WorkerMessage:
        """The next news of a kind. Raises TandemError when the leg was dropped instead, or nothing came."""
        try:
            async with asyncio.timeout(STEP_TIMEOUT_S):
                while (message := await self._news.get()).WhichOneof("body") != body:
                    if message.HasField("leg_dropped"):
                        raise TandemError(f"A leg was dropped: {message.leg_dropped.message}")
                return message
        except TimeoutError:
            raise TandemError(f"No {body} came within {STEP_TIMEOUT_S:g} s.") from None


@dataclass(frozen=True, slots=True)
class _Worker:
    """One worker process, attached."""

    record: WorkerRecord
    link: WorkerLink
    news: _Listener


@asynccontextmanager
async def _worker(role: Role, module: str, arguments: Sequence[str]) -> AsyncIterator[_Worker]:
    """Starts a worker process and attaches to it, as a router does."""
    async with running_module(module, arguments) as process:
        worker_id, address, digest = (await exchange(process, b"\n")).decode().split()
        record = WorkerRecord(WorkerId(worker_id), Incarnation(1), role, address, digest)
        news = _Listener()
        hello = wpb.RouterHello(router_id="bench", digest=digest)
        link = WorkerLink(record, hello, None, SILENCE_S, news)
        running = asyncio.create_task(link.run())
        try:
            async with asyncio.timeout(STEP_TIMEOUT_S):
                await news.attached_now.wait()
            yield _Worker(record, link, news)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def measure_overlap(
    rounds: int = 3,
    prompt_tokens: int = PROMPT_TOKENS,
    link_bytes_per_s: float = LINK_BYTES_PER_S,
    model: str = "smollm2",
    codec: str = "identity",
) -> OverlapFigures:
    """Measures with `python -m prefill_worker` (its link throttled) and `python -m decode_worker`.

    `codec` writes the KV; one that needs no thresholds.

    Raises TandemError when a worker does not start or drops a prompt.
    """
    common = ["--model", model, "--threads", "1", "--pool-blocks", "256", "--transports", "tcp"]
    common += ["--codec", codec]
    draw = random.Random(0)
    overlapped: list[Handover] = []
    afterwards: list[Handover] = []
    async with AsyncExitStack() as stack:
        slow = [f"{link_bytes_per_s:g}", *common]
        prefill = await stack.enter_async_context(_worker(Role.PREFILL, "benchmarks.slow_prefill", slow))
        decode = await stack.enter_async_context(_worker(Role.DECODE, "decode_worker", common))
        for number in range(rounds + 1):
            for early, figures in ((True, overlapped), (False, afterwards)):
                prompt = [draw.randrange(1000, 40_000) for _ in range(prompt_tokens)]
                leg_id = f"{number}-{early}"
                figures.append(await _hand_over(prefill, decode, leg_id, prompt, early))
    # The first of each opened the connections.
    return _figures(codec, overlapped[1:], afterwards[1:], prompt_tokens, link_bytes_per_s)


async def _hand_over(
    prefill: _Worker, decode: _Worker, leg_id: str, prompt: Sequence[int], early: bool
) -> Handover:
    """One prompt, from its start until the KV landed; `early` lets the KV move meanwhile."""
    began_s = time.perf_counter()
    prefill.link.send(_start_prefill(leg_id, prompt))
    growing = (await prefill.news.until("kv_offered")).kv_offered
    if early:
        decode.link.send(_prefetch_kv(prefill.record, leg_id, prompt, growing.epoch))
    step = (await prefill.news.until("step")).step
    read_s = time.perf_counter()
    offer = (await prefill.news.until("kv_offered")).kv_offered
    first = step.sequences[0].token_ids[0]
    decode.link.send(_start_decode(prefill.record, leg_id, prompt, offer.epoch, first))
    landed = (await decode.news.until("kv_landed")).kv_landed
    landed_s = time.perf_counter()
    await decode.news.until("step")
    return Handover(read_s - began_s, landed_s - read_s, landed.moved_bytes)


def _start_prefill(leg_id: str, prompt: Sequence[int]) -> wpb.RouterMessage:
    return wpb.RouterMessage(
        start_prefill=wpb.StartPrefill(
            leg_id=leg_id,
            request_id=leg_id,
            token_ids=prompt,
            prompt_tokens=len(prompt),
            sample_indices=[0],
            sampling=sampling_to_wire(PARAMS),
            remaining_s=STEP_TIMEOUT_S,
        )
    )


def _prefetch_kv(source: WorkerRecord, leg_id: str, prompt: Sequence[int], epoch: int) -> wpb.RouterMessage:
    return wpb.RouterMessage(
        prefetch_kv=wpb.PrefetchKv(
            leg_id=leg_id,
            request_id=leg_id,
            token_ids=prompt,
            prompt_tokens=len(prompt),
            sample_indices=[0],
            remaining_s=STEP_TIMEOUT_S,
            source=address_to_wire(source),
            epoch=epoch,
        )
    )


def _start_decode(
    source: WorkerRecord, leg_id: str, prompt: Sequence[int], epoch: int, first_token: int
) -> wpb.RouterMessage:
    return wpb.RouterMessage(
        start_decode=wpb.StartDecode(
            leg_id=leg_id,
            request_id=leg_id,
            token_ids=prompt,
            prompt_tokens=len(prompt),
            samples=[wpb.SampleStart(sample_index=0, token_ids=[first_token])],
            sampling=sampling_to_wire(PARAMS),
            remaining_s=STEP_TIMEOUT_S,
            source=address_to_wire(source),
            epoch=epoch,
        )
    )


def _figures(
    codec: str,
    overlapped: Sequence[Handover],
    afterwards: Sequence[Handover],
    prompt_tokens: int,
    link_bytes_per_s: float,
) -> OverlapFigures:
    left_s = statistics.median(one.landed_s for one in overlapped)
    whole_s = statistics.median(one.landed_s for one in afterwards)
    moved_bytes = afterwards[0].moved_bytes
    return OverlapFigures(
        codec=codec,
        prompt_tokens=prompt_tokens,
        link_bytes_per_s=link_bytes_per_s,
        moved_bytes=moved_bytes,
        rounds=len(overlapped),
        limit_s=moved_bytes / link_bytes_per_s,
        prefill_afterwards_s=statistics.median(one.prefill_s for one in afterwards),
        prefill_overlapped_s=statistics.median(one.prefill_s for one in overlapped),
        landed_afterwards_s=whole_s,
        landed_overlapped_s=left_s,
        ratio=left_s / whole_s,
    )


if __name__ == "__main__":
    named = sys.argv[1] if len(sys.argv) > 1 else "identity"
    json.dump(asdict(asyncio.run(measure_overlap(codec=named))), sys.stdout, indent=2)
    print()
