"""Edge: measures the time to the first token of one request, through a router or straight at a worker."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from tandem import grpc_edge
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc, worker_pb2_grpc
from tandem.v1 import worker_pb2 as wpb

PROBE_TIMEOUT_S = 10.0


async def router_probe(channel: Any, prompt: Sequence[int]) -> float:
    """Seconds until the first message with a token; the rest of the stream is cancelled."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=2, min_tokens=2, ignore_eos=True),
    )
    started_s = time.perf_counter()
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=PROBE_TIMEOUT_S)
    async for response in call:
        if response.chunks:
            took_s = time.perf_counter() - started_s
            async for _rest in call:
                continue
            return took_s
    raise ValueError("the stream ended without a token")


@asynccontextmanager
async def direct_probe(
    address: str, digest: str, prompt: Sequence[int]
) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """Attaches to a prefill worker as a router does; gives a function that measures one first token."""
    numbers = itertools.count()
    channel = grpc_edge.channel(address)
    call = worker_pb2_grpc.WorkerServiceStub(channel).Attach()

    async def ask() -> float:
        leg_id = f"probe-{next(numbers)}"
        start = wpb.StartPrefill(
            leg_id=leg_id,
            request_id=leg_id,
            token_ids=prompt,
            prompt_tokens=len(prompt),
            sample_indices=[0],
            sampling=pb.SamplingParams(temperature=0.0, max_tokens=2, min_tokens=2, ignore_eos=True),
            remaining_s=PROBE_TIMEOUT_S,
        )
        started_s = time.perf_counter()
        await call.write(wpb.RouterMessage(start_prefill=start))
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            while not _carries(await call.read(), leg_id):
                continue
        took_s = time.perf_counter() - started_s
        await call.write(wpb.RouterMessage(cancel=wpb.CancelLeg(leg_id=leg_id)))
        return took_s

    try:
        await call.write(wpb.RouterMessage(hello=wpb.RouterHello(router_id="probe", digest=digest)))
        yield ask
    finally:
        call.cancel()
        await channel.close()


def _carries(message: Any, leg_id: str) -> bool:
    """Whether it is the step with the probe's token. Raises ValueError when the worker hung up."""
    if not isinstance(message, wpb.WorkerMessage):
        raise ValueError("the worker closed the stream")
    return any(sequence.leg_id == leg_id for sequence in message.step.sequences)
