"""Edge: `tandem profile`: times of steps and KV transfers on this hardware, as JSON for the planner."""

import argparse
import asyncio
import json
import logging
import statistics
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_arguments import check_writable
from benchmarks.engine_drive import EngineDrive
from benchmarks.kv import TRANSPORTS
from benchmarks.kv_layouts import Layout, Placement
from benchmarks.kv_layouts import Shape as BlockShape
from benchmarks.kv_pulls import measured
from benchmarks.kv_times import Road
from benchmarks.machine_limits import machine_name
from decode_worker.decode_leg import DecodeOutcome
from engine.loading import LoadedEngine, load_engine
from engine.models.model_config import ModelConfig, read_model_config
from engine.models.model_source import resolve_model
from engine.step import SampleRequest, SequenceSlice, StepPlan, StepResult
from engine.step_loop import StepLoop
from tandem.errors import InvalidRequest
from tandem.ids import BlockId, Incarnation, WorkerId
from tandem.logs import configure_logging
from tandem.sampling import SamplingParams
from tandem.worker import Role
from tandem.worker_config import WorkerConfig

_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
_POINT_S = 1.0
"""A shape that has taken this long is not timed once more."""
_LOOP_BATCH = 8
_LOOP_STEPS = 24
_LOOP_TIMEOUT_S = 60.0
_GIT_TIMEOUT_S = 5.0
_TRANSFER_BYTES = 1 << 26
"""Most bytes of a transfer that is measured: four pools of twice as many are made for it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One step to time: prompt chunks as (tokens, tokens before them), and a decode batch."""

    prompts: tuple[tuple[int, int], ...]
    batch: int = 0
    context_tokens: int = 0
    """Of each sequence of the batch, the token that is fed included."""

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV the step needs room for."""
        return sum(tokens + before for tokens, before in self.prompts) + self.batch * self.context_tokens


def grid(token_budget: int, context_tokens: int, pool_tokens: int) -> tuple[Shape, ...]:
    """Single prompts, several prompts, decode batches, and both together, as far as they fit."""
    lengths = [tokens for tokens in (1, 16, 64, 128, 256, 512, 1024) if tokens <= token_budget]
    shapes = [Shape(((tokens, before),)) for before in (0, 512, 2048) for tokens in lengths]
    shapes += [Shape(((token_budget // count, 0),) * count) for count in (2, 4, 8)]
    shapes += [Shape((), batch, each) for each in (64, 512, 2048) for batch in (1, 2, 4, 8, 16, 32, 64)]
    shapes += [Shape(((tokens, 0),), batch, 256) for tokens in (64, 256) for batch in (4, 16)]
    return tuple(shape for shape in shapes if _fits(shape, context_tokens, pool_tokens))


def _fits(shape: Shape, context_tokens: int, pool_tokens: int) -> bool:
    longest = max([shape.context_tokens, *(tokens + before for tokens, before in shape.prompts)])
    return longest <= context_tokens and shape.kv_tokens <= pool_tokens // 2


def transfer_layout(model: ModelConfig, quick: bool) -> Layout:
    """Scattered blocks like the model's (in float32), 1 to 64 of them, as far as memory goes."""
    shape = BlockShape(model.layers, model.kv_heads, model.head_dim)
    counts = [count for count in (1, 4, 16, 64) if count * shape.block_bytes <= _TRANSFER_BYTES]
    return Layout(shape, Placement.SCATTERED, tuple(counts[: 1 if quick else None] or [1]))


async def measured_transfers(layout: Layout, runs: int) -> list[dict[str, Any]]:
    """Whole hand-offs between two processes of this machine, with checksums, from the ask to the commit."""
    roads = [Road(transport, checksum=True) for transport in TRANSPORTS]
    return [
        {
            "transport": road.transport,
            "bytes": case.moved_bytes,
            "seconds": statistics.median(timed.pull_s for timed in pulls),
            "runs": len(pulls),
        }
        for case in await measured(layout, roads, runs)
        for road, pulls in case.roads.items()
    ]


QUICK = (Shape(((16, 0),)), Shape(((64, 64),)), Shape((), 1, 64), Shape((), 4, 64), Shape(((16, 0),), 2, 64))


def run(chosen: argparse.Namespace) -> int:
    """Measures and writes. Raises TandemError."""
    for name, value in (("--threads", chosen.threads), ("--runs", chosen.runs)):
        if value < 1:
            raise InvalidRequest(f"{name} must be 1 or more, not {value}.", name)
    check_writable({"--output": chosen.output})
    configure_logging(logging.WARNING)
    config = WorkerConfig(
        WorkerId("profile"),
        Incarnation(1),
        Role.MIXED,
        resolve_model(chosen.model),
        chosen.model,
        pool_blocks=128 if chosen.quick else 2048,
        dtype=chosen.dtype,
        threads=chosen.threads,
    )
    # As in a worker, whose hand-offs compute on one core; the engine sets its own threads when it loads.
    torch.set_num_threads(1)
    layout = transfer_layout(read_model_config(config.model_folder), chosen.quick)
    transfers = asyncio.run(measured_transfers(layout, chosen.runs))
    with load_engine(config) as engine:
        pool_tokens = config.pool_blocks * config.block_size
        shapes = QUICK if chosen.quick else grid(config.token_budget, engine.context_tokens, pool_tokens)
        written = json.dumps(profile_json(engine, config, shapes, chosen.runs, transfers))
    if chosen.output is None:
        print(written)
    else:
        chosen.output.write_text(written + "\n")
    return 0


def profile_json(
    engine: LoadedEngine,
    config: WorkerConfig,
    shapes: Sequence[Shape],
    runs: int,
    transfers: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What `tandem profile` writes; the keys are documented in docs/json-output.md."""
    return {
        "version": 1,
        "kind": "tandem profile",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": config.device,
        "machine": machine_name(),
        "model": config.model_name,
        "dtype": config.dtype,
        "threads": config.threads,
        "block_size": config.block_size,
        "kv_bytes_per_token": engine.cache.block_bytes // config.block_size,
        "step_overhead_s": asyncio.run(_step_overhead_s(engine, config)),
        "points": [_point(engine, config.block_size, shape, runs) for shape in shapes],
        "transfers": list(transfers),
    }


def _point(engine: LoadedEngine, block_size: int, shape: Shape, runs: int) -> dict[str, Any]:
    plan = _plan(shape, block_size)
    engine.runner.run(plan)
    times_s: list[float] = []
    while len(times_s) < runs and sum(times_s) < _POINT_S:
        times_s.append(engine.runner.run(plan).compute_s)
    return {
        "prompts": [list(prompt) for prompt in shape.prompts],
        "decode_batch": shape.batch,
        "decode_context_tokens": shape.batch * shape.context_tokens,
        "seconds": statistics.median(times_s),
        "runs": len(times_s),
    }


def _plan(shape: Shape, block_size: int) -> StepPlan:
    """Sequences lie one after the other in the pool, whatever KV is there."""
    slices: list[SequenceSlice] = []
    next_block = 0
    sequences = [*shape.prompts, *(((1, shape.context_tokens - 1),) * shape.batch)]
    for key, (tokens, before) in enumerate(sequences):
        blocks = -(-(tokens + before) // block_size)
        table = tuple(BlockId(next_block + index) for index in range(blocks))
        next_block += blocks
        slices.append(SequenceSlice((1,) * tokens, before, table, (SampleRequest(key, 0, 0, _GREEDY),)))
    return StepPlan(0, tuple(slices))


async def _step_overhead_s(engine: LoadedEngine, config: WorkerConfig) -> float:
    """What a worker's step loop adds to a step on the torch thread: scheduler, thread change, event loop."""
    drive = EngineDrive(engine, config)
    added_s: list[float] = []
    done = asyncio.Event()
    ended_s: list[float] = []

    def on_outcome(plan: StepPlan, result: StepResult, outcome: DecodeOutcome) -> None:
        now_s = time.perf_counter()
        added_s.extend(now_s - before - result.compute_s for before in ended_s[-1:])
        ended_s.append(now_s)
        if len(ended_s) == _LOOP_STEPS:
            done.set()

    with ThreadPoolExecutor(max_workers=1) as torch_thread:
        prompts = [drive.prompt(config.block_size) for _ in range(_LOOP_BATCH)]
        drive.join(drive.read(prompts, _LOOP_STEPS + 1))
        loop = StepLoop(
            drive.decode, engine.runner, torch_thread, time.perf_counter, on_outcome, lambda dropped: None
        )
        stepping = asyncio.create_task(loop.run())
        try:
            async with asyncio.timeout(_LOOP_TIMEOUT_S):
                await done.wait()
        finally:
            stepping.cancel()
            await asyncio.gather(stepping, return_exceptions=True)
    return statistics.median(added_s)


def _commit() -> str:
    """Of the checkout that this code lies in; empty where there is none."""
    command = ("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
