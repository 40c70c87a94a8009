"""Edge: `tandem bench engine`: the engine alone, each figure beside the machine's limit of the same run."""

import argparse
import json
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.engine_drive import EngineDrive, StepTimes
from benchmarks.engine_overhead import profile_steps
from benchmarks.kv_waste import calculated_kv_waste, measure_kv_waste
from benchmarks.machine_limits import MachineLimits, machine_name, measure_limits
from benchmarks.model_cost import decode_flops, kv_elements_per_token, prefill_flops, read_parameters
from benchmarks.sharegpt_lengths import SHAREGPT
from benchmarks.speculative import measure_speculative
from engine.loading import DTYPES, LoadedEngine, load_engine
from engine.models.model_config import ModelConfig
from engine.models.model_source import resolve_model
from engine.models.tokenizer import Tokenizer
from tandem.errors import InvalidRequest
from tandem.ids import Incarnation, WorkerId
from tandem.logs import configure_logging
from tandem.worker import Role
from tandem.worker_config import WorkerConfig

ResultT = TypeVar("ResultT")

ALLOWANCE_BYTES = 400_000_000
"""What interpreter, libraries and activations may take beside weights and KV pool."""

KV_WASTE_LIMIT = 0.04
"""Issue 4's, after PagedAttention (SOSP'23, section 1), over the lengths of real requests."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    decode: tuple[tuple[int, int, int, int], ...]
    """(batch, prompt tokens, output tokens, runs)."""
    prefill: tuple[int, int]
    """(prompts, tokens of each)."""
    cached_prompt: int
    profiled: tuple[int, int, int]
    """(batch, prompt tokens, output tokens)."""
    runs: int
    """Of prefill and prefix cache."""
    speculative: tuple[int, int]
    """(output tokens, runs)."""
    pool_blocks: int
    conversations: tuple[int, int]
    """(of ShareGPT's lengths at once, steps), of which the KV waste is counted."""


FULL = Sizes(
    decode=((1, 32, 64, 3), (8, 32, 64, 3), (32, 32, 64, 3), (16, 512, 24, 1)),
    prefill=(8, 512),
    cached_prompt=1200,
    profiled=(32, 32, 64),
    runs=2,
    speculative=(128, 3),
    pool_blocks=1024,
    conversations=(8, 32),
)
QUICK = Sizes(
    decode=((1, 32, 16, 1), (8, 32, 16, 1), (32, 32, 16, 1)),
    prefill=(2, 512),
    cached_prompt=400,
    profiled=(32, 32, 8),
    runs=1,
    speculative=(64, 1),
    pool_blocks=320,
    conversations=(3, 16),
)


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """One batch decoded to its end."""

    batch: int
    prompt_tokens: int
    output_tokens: int
    times: StepTimes
    prefill_times: StepTimes
    kv_waste: float
    """Share of the allocated token places that hold no token, mean over the steps."""

    @property
    def tokens_per_s(self) -> float:
        """Of the decode steps alone."""
        return self.batch * len(self.times.wall_s) / sum(self.times.wall_s)


@dataclass(frozen=True, slots=True)
class EngineBench:
    """An engine under measurement, and what its machine can do."""

    engine: LoadedEngine
    config: WorkerConfig
    drive: EngineDrive
    sizes: Sizes

    def beside_limits(self, work: Callable[[], ResultT]) -> tuple[ResultT, MachineLimits]:
        """What `work` gives, and the machine's limits just before and after it, the better of the two.

        A shared machine's rates change by half within a minute.
        """
        dtype = DTYPES[self.config.dtype]
        before = measure_limits(dtype)
        result = work()
        return result, before.best(measure_limits(dtype))


def run(chosen: argparse.Namespace) -> int:
    """Measures and prints. Raises TandemError."""
    if chosen.threads < 1:
        raise InvalidRequest(f"--threads must be 1 or more, not {chosen.threads}.", "--threads")
    configure_logging(logging.WARNING)
    result = measure(chosen.model, chosen.dtype, chosen.threads, QUICK if chosen.quick else FULL)
    print(json.dumps(result) if chosen.json else text(result))
    return 0


def measure(model: str, dtype: str, threads: int, sizes: Sizes) -> dict[str, Any]:
    """Output of `tandem bench engine --json`; the keys are documented in docs/json-output.md."""
    with _opened(model, dtype, threads, sizes) as bench:
        decode = [_decode(bench, *shape) for shape in sizes.decode]
        return {
            "benchmark": "engine",
            "model": model,
            "dtype": dtype,
            "threads": threads,
            "machine": machine_name(),
            "torch": torch.__version__,
            "decode": decode,
            "prefill": _prefill(bench),
            "prefix_cache": _prefix_cache(bench),
            "speculative": _speculative(bench),
            "kv_waste": _kv_waste(bench, decode),
            "memory": _memory(bench),
            "overhead": _overhead(bench),
        }


@contextmanager
def _opened(model: str, dtype: str, threads: int, sizes: Sizes) -> Iterator[EngineBench]:
    config = WorkerConfig(
        WorkerId("bench"),
        Incarnation(1),
        Role.MIXED,
        resolve_model(model),
        model,
        pool_blocks=sizes.pool_blocks,
        dtype=dtype,
        threads=threads,
    )
    with load_engine(config) as engine:
        yield EngineBench(engine, config, EngineDrive(engine, config), sizes)


def _decode(
    bench: EngineBench, batch: int, prompt_tokens: int, output_tokens: int, runs: int
) -> dict[str, Any]:
    """The run with the median rate."""
    results, limits = bench.beside_limits(
        lambda: [_decode_once(bench, batch, prompt_tokens, output_tokens) for _ in range(runs)]
    )
    middle = sorted(results, key=lambda one: one.tokens_per_s)[runs // 2]
    return decode_json(middle, bench.engine.model_config, DTYPES[bench.config.dtype].itemsize, limits)


def _decode_once(bench: EngineBench, batch: int, prompt_tokens: int, output_tokens: int) -> DecodeRun:
    drive = bench.drive
    read = drive.read([drive.prompt(prompt_tokens) for _ in range(batch)], output_tokens)
    waste: list[float] = []

    def account(done: int) -> None:
        if done < output_tokens - 1:
            kept = batch * (prompt_tokens + done)
            waste.append(1.0 - kept / (drive.pool.allocated_blocks * bench.config.block_size))

    times = drive.write(read, account)
    return DecodeRun(batch, prompt_tokens, output_tokens, times, read.times, statistics.mean(waste))


def decode_json(run: DecodeRun, model: ModelConfig, itemsize: int, limits: MachineLimits) -> dict[str, Any]:
    """One entry of `decode`; `itemsize` is bytes a weight."""
    step_s = sum(run.times.wall_s) / len(run.times.wall_s)
    context_tokens = run.batch * (run.prompt_tokens + run.output_tokens // 2)
    weight_bytes = read_parameters(model) * itemsize
    kv_bytes = context_tokens * kv_elements_per_token(model) * itemsize
    read_s = (weight_bytes + kv_bytes) / (limits.read_gb_s * 1e9)
    compute_s = decode_flops(model, run.batch, context_tokens) / (limits.gemm_gflop_s * 1e9)
    whole_s = sum(run.times.wall_s) + sum(run.prefill_times.wall_s)
    return {
        "batch": run.batch,
        "prompt_tokens": run.prompt_tokens,
        "output_tokens": run.output_tokens,
        "tokens_per_s": run.tokens_per_s,
        "tokens_per_s_with_prefill": run.batch * run.output_tokens / whole_s,
        "step_p50_ms": statistics.median(run.times.wall_s) * 1e3,
        "step_max_ms": max(run.times.wall_s) * 1e3,
        "read_gb_s": limits.read_gb_s,
        "gemm_gflop_s": limits.gemm_gflop_s,
        "bandwidth_share": weight_bytes / (limits.read_gb_s * 1e9) / step_s,
        "limit_share": max(read_s, compute_s) / step_s,
        "limited_by": "bandwidth" if read_s > compute_s else "compute",
        "kv_waste": run.kv_waste,
    }


def _prefill(bench: EngineBench) -> dict[str, Any]:
    prompts, tokens = bench.sizes.prefill
    drive = bench.drive

    def once() -> float:
        read = drive.read([drive.prompt(tokens) for _ in range(prompts)])
        drive.forget(read)
        return sum(read.times.wall_s)

    times, limits = bench.beside_limits(lambda: [once() for _ in range(bench.sizes.runs)])
    took_s = statistics.median(times)
    rate = prompts * prefill_flops(bench.engine.model_config, tokens) / took_s / 1e9
    return {
        "prompts": prompts,
        "tokens": tokens,
        "token_budget": bench.config.token_budget,
        "tokens_per_s": prompts * tokens / took_s,
        "gflop_s": rate,
        "gemm_gflop_s": limits.gemm_gflop_s,
        "gemm_share": rate / limits.gemm_gflop_s,
    }


def _overhead(bench: EngineBench) -> dict[str, Any]:
    batch, prompt_tokens, output_tokens = bench.sizes.profiled
    read = bench.drive.read([bench.drive.prompt(prompt_tokens) for _ in range(batch)], output_tokens)
    profiled = profile_steps(lambda: bench.drive.write(read), bench.engine.team)
    steps = output_tokens - 1
    return {
        "batch": batch,
        "step_ms": profiled.wall_s / steps * 1e3,
        "operators_per_step": profiled.operators / steps,
        "operators_ms": profiled.operators_s / steps * 1e3,
        "native_calls_per_step": profiled.native_calls / steps,
        "native_ms": profiled.native_s / steps * 1e3,
        "outside_kernels_ms": profiled.outside_s / steps * 1e3,
        "outside_kernels_share": profiled.overhead_share,
    }


def _prefix_cache(bench: EngineBench) -> dict[str, Any]:
    """Time to first token of a prompt that nobody saw before, and of the same again."""
    miss_s: list[float] = []
    hit_s: list[float] = []
    for _ in range(bench.sizes.runs):
        prompt = bench.drive.prompt(bench.sizes.cached_prompt)
        for times in (miss_s, hit_s):
            read = bench.drive.read([prompt])
            bench.drive.forget(read)
            times.append(sum(read.times.wall_s))
    miss, hit = statistics.median(miss_s), statistics.median(hit_s)
    return {
        "prompt_tokens": bench.sizes.cached_prompt,
        "ttft_miss_ms": miss * 1e3,
        "ttft_hit_ms": hit * 1e3,
        "hit_share": hit / miss,
    }


def _speculative(bench: EngineBench) -> dict[str, Any]:
    output_tokens, runs = bench.sizes.speculative
    tokenizer = Tokenizer.load(bench.config.model_folder)
    return measure_speculative(bench.engine, bench.config, tokenizer, output_tokens, runs).as_json()


def _kv_waste(bench: EngineBench, decode: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of conversations of real lengths; `decode` has that of short contexts."""
    block_size = bench.config.block_size
    counted = measure_kv_waste(bench.drive, block_size, *bench.sizes.conversations)
    shortest = min(one["prompt_tokens"] for one in decode)
    return {
        "share": counted.share,
        "limit": KV_WASTE_LIMIT,
        "conversations": counted.conversations,
        "steps": counted.steps,
        "mean_context_tokens": counted.mean_context_tokens,
        "block_tokens": block_size,
        "share_calculated": calculated_kv_waste(SHAREGPT, block_size),
        "share_short_contexts": max(one["kv_waste"] for one in decode if one["prompt_tokens"] == shortest),
    }


def _memory(bench: EngineBench) -> dict[str, Any]:
    """After all of the above, so that activations and buffers have grown to their size."""
    itemsize = DTYPES[bench.config.dtype].itemsize
    model = bench.engine.model_config
    parameters = read_parameters(model)
    if not model.tied_embeddings:
        parameters += model.vocabulary_tokens * model.hidden_size
    weight_bytes = parameters * itemsize
    pool_bytes = bench.engine.cache.num_blocks * bench.engine.cache.block_bytes
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident_bytes = pages * os.sysconf("SC_PAGE_SIZE")
    allowed_bytes = weight_bytes + pool_bytes + ALLOWANCE_BYTES
    return {
        "resident_bytes": resident_bytes,
        "weight_bytes": weight_bytes,
        "pool_bytes": pool_bytes,
        "allowance_bytes": ALLOWANCE_BYTES,
        "resident_share": resident_bytes / allowed_bytes,
    }


def text(result: dict[str, Any]) -> str:
    """What is printed without --json."""
    prefill, overhead = result["prefill"], result["overhead"]
    cache, memory, guessed = result["prefix_cache"], result["memory"], result["speculative"]
    waste = result["kv_waste"]
    lines = [f"{result['model']} {result['dtype']}, {result['threads']} threads on {result['machine']}"]
    lines += [
        f"decode, batch {one['batch']}, {one['prompt_tokens']} in {one['output_tokens']} out: "
        f"{one['tokens_per_s']:.1f} tok/s ({one['tokens_per_s_with_prefill']:.1f} with prefill), "
        f"{one['step_p50_ms']:.2f} ms a step, {one['bandwidth_share']:.0%} of the weights' floor "
        f"at {one['read_gb_s']:.1f} GB/s, "
        f"{one['limit_share']:.0%} of its limit ({one['limited_by']}), {one['kv_waste']:.1%} KV waste"
        for one in result["decode"]
    ]
    lines += [
        f"prefill, {prefill['prompts']} x {prefill['tokens']}: {prefill['tokens_per_s']:.0f} tok/s, "
        f"{prefill['gflop_s']:.0f} GFLOP/s, {prefill['gemm_share']:.0%} "
        f"of a matrix product's {prefill['gemm_gflop_s']:.0f}",
        f"overhead, batch {overhead['batch']}: {overhead['outside_kernels_ms']:.2f} of "
        f"{overhead['step_ms']:.2f} ms outside {overhead['operators_per_step']:.0f} operators and "
        f"{overhead['native_calls_per_step']:.0f} native calls, "
        f"{overhead['outside_kernels_share']:.1%}",
        f"prefix cache, {cache['prompt_tokens']} tokens: first token after {cache['ttft_hit_ms']:.1f} ms "
        f"instead of {cache['ttft_miss_ms']:.1f} ms, {cache['hit_share']:.1%}",
        f"guessing tokens, batch 1: {guessed['tokens_per_s']:.1f} instead of "
        f"{guessed['plain_tokens_per_s']:.1f} tok/s, {guessed['speedup']:.2f} x, "
        f"{'the same' if guessed['identical'] else 'other'} tokens",
        f"memory: {memory['resident_bytes'] / 1e6:.0f} MB resident, {memory['resident_share']:.0%} of "
        f"weights + pool + {memory['allowance_bytes'] / 1e6:.0f} MB",
        f"KV waste of {waste['conversations']} conversations of {waste['mean_context_tokens']:.0f} tokens: "
        f"{waste['share']:.2%} in blocks of {waste['block_tokens']} tokens, "
        f"{waste['share_short_contexts']:.1%} of short contexts",
    ]
    return "\n".join(lines)
