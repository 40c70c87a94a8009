"""Edge: the load of the relay benchmark, in a process of its own: `python -m benchmarks.relay_load`.

Reads a LoadSpec as one line of JSON on stdin, prints a LoadResult. Messages are counted, not parsed, so that
the load costs as little as it can beside the router on a small machine; one stream is checked token by token.
"""

import asyncio
import math
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import psutil
import uvloop
from pydantic import TypeAdapter

from benchmarks.probes import direct_probe, router_probe
from tandem import grpc_edge
from tandem.v1 import inference_pb2 as pb

GENERATE = "/tandem.v1.InferenceService/Generate"
CALL_TIMEOUT_S = 60.0
PROMPT = tuple(range(100, 116))


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What to do. `seconds` is the length of the saturated and of the paced phase each.

    `paced_share` is the paced phase's rate as a share of the saturated one's.
    """

    router_address: str
    prefill_address: str
    digest: str
    streams: int
    tokens_a_stream: int
    seconds: float
    paced_share: float
    probes: int
    router_pid: int
    stub_pids: tuple[int, ...]

    def to_line(self) -> bytes:
        """One line of JSON."""
        return TypeAdapter(LoadSpec).dump_json(self) + b"\n"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What was seen. `ttft_*_s` are the durations of single probes.

    The shares of a core are those used while saturated, by the router, all stubs, and this process.
    """

    tokens_per_s: float
    paced_tokens_per_s: float
    ttft_direct_s: tuple[float, ...]
    ttft_router_s: tuple[float, ...]
    ttft_router_paced_s: tuple[float, ...]
    router_cpu_share: float
    stubs_cpu_share: float
    load_cpu_share: float

    @staticmethod
    def from_line(line: bytes) -> "LoadResult":
        """Raises pydantic.ValidationError."""
        return TypeAdapter(LoadResult).validate_json(line)


class _Streams:
    """Runs 32-token streams through the router and counts the finished ones."""

    def __init__(self, spec: LoadSpec, channel: Any) -> None:
        self._spec = spec
        self._call = channel.unary_stream(GENERATE, request_serializer=None, response_deserializer=None)
        sampling = pb.SamplingParams(
            temperature=0.0, max_tokens=spec.tokens_a_stream, min_tokens=spec.tokens_a_stream, ignore_eos=True
        )
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling)
        self._request = request.SerializeToString()
        self.finished = 0

    async def one(self) -> None:
        """A whole stream, unparsed."""
        async for _message in self._call(self._request, timeout=CALL_TIMEOUT_S):
            pass
        self.finished += 1

    async def check_one(self) -> None:
        """A whole stream, parsed. Raises ValueError unless every token came once and in order."""
        seen = 0
        async for message in self._call(self._request, timeout=CALL_TIMEOUT_S):
            for chunk in pb.GenerateResponse.FromString(message).chunks:
                if chunk.first_index != seen:
                    raise ValueError(f"token {seen} expected, {chunk.first_index} came")
                seen += len(chunk.token_ids)
        if seen != self._spec.tokens_a_stream:
            raise ValueError(f"{seen} tokens came instead of {self._spec.tokens_a_stream}")

    async def saturate(self) -> tuple[float, tuple[float, float, float]]:
        """Keeps `streams` streams open for the time; gives tokens/s and CPU shares, the ramp left out."""
        stop = asyncio.Event()

        async def one_after_another() -> None:
            while not stop.is_set():
                await self.one()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._spec.streams):
                tasks.create_task(one_after_another())
            await asyncio.sleep(min(1.0, self._spec.seconds / 4))
            before, used_s, started_s = self.finished, self._cpu_s(), time.perf_counter()
            await asyncio.sleep(self._spec.seconds)
            finished, elapsed_s = self.finished - before, time.perf_counter() - started_s
            shares = [(now - then) / elapsed_s for then, now in zip(used_s, self._cpu_s(), strict=True)]
            stop.set()
        return finished * self._spec.tokens_a_stream / elapsed_s, (shares[0], shares[1], shares[2])

    def _cpu_s(self) -> tuple[float, float, float]:
        """CPU seconds used so far by router, stubs, and us."""
        stubs = math.fsum(_cpu_s(pid) for pid in self._spec.stub_pids)
        return _cpu_s(self._spec.router_pid), stubs, _cpu_s(os.getpid())

    async def pace(self, tasks: asyncio.TaskGroup, tokens_per_s: float) -> None:
        """Starts streams at a fixed rate, whatever becomes of them, until cancelled."""
        gap_s = self._spec.tokens_a_stream / tokens_per_s
        due_s = time.perf_counter()
        while True:
            due_s += gap_s
            await asyncio.sleep(due_s - time.perf_counter())
            tasks.create_task(self.one())


async def _measure(spec: LoadSpec) -> LoadResult:
    channel = grpc_edge.channel(spec.router_address)
    try:
        streams = _Streams(spec, channel)
        await streams.check_one()
        direct, through = await _idle_probes(spec, channel)
        tokens_per_s, shares = await streams.saturate()
        paced_per_s, paced = await _paced_probes(spec, channel, streams, tokens_per_s * spec.paced_share)
        await streams.check_one()
    finally:
        await channel.close()
    return LoadResult(tokens_per_s, paced_per_s, direct, through, paced, *shares)


async def _idle_probes(spec: LoadSpec, channel: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """One request at a time, in turn straight to the stub worker and through the router."""
    direct: list[float] = []
    through: list[float] = []
    async with direct_probe(spec.prefill_address, spec.digest, PROMPT) as ask_directly:
        for _ in range(spec.probes):
            direct.append(await ask_directly())
            through.append(await router_probe(channel, PROMPT))
    return tuple(direct), tuple(through)


async def _paced_probes(
    spec: LoadSpec, channel: Any, streams: _Streams, tokens_per_s: float
) -> tuple[float, tuple[float, ...]]:
    """Probes while streams come at the paced rate; gives the rate that was really served, and the times."""
    async with asyncio.TaskGroup() as tasks:
        pacing = tasks.create_task(streams.pace(tasks, tokens_per_s))
        await asyncio.sleep(min(1.0, spec.seconds / 4))
        before, started_s = streams.finished, time.perf_counter()
        times = [seconds async for seconds in _probes_for(channel, spec.seconds)]
        served = (streams.finished - before) * spec.tokens_a_stream / (time.perf_counter() - started_s)
        pacing.cancel()
    return served, tuple(times)


async def _probes_for(channel: Any, seconds: float) -> AsyncIterator[float]:
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        yield await router_probe(channel, PROMPT)
        await asyncio.sleep(0.01)


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Measures once."""
    spec = TypeAdapter(LoadSpec).validate_json(sys.stdin.buffer.readline())
    result = uvloop.run(_measure(spec))
    sys.stdout.buffer.write(TypeAdapter(LoadResult).dump_json(result) + b"\n")


if __name__ == "__main__":
    main()
