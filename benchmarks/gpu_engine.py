"""Edge: the engine's checks on a GPU: steps of a random Llama-3-8B beside the device's own limits."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_kernels import LLAMA_3_8B, DeviceLimits, device_limits
from benchmarks.gpu_report import GpuFigure
from benchmarks.model_cost import kv_elements_per_token, prefill_flops, read_parameters
from engine.computing import Computing
from engine.cuda.accelerator import Accelerator, CudaAccelerator
from engine.cuda.loading import load_on_device
from engine.drafting.loading import SmallEngine
from engine.models.model_config import ModelConfig
from engine.models.random_weights import random_weights
from engine.sampling.sampler import Sampler
from engine.step import SampleRequest, SequenceSlice, StepPlan
from tandem.errors import ConfigError
from tandem.ids import BlockId, Incarnation, WorkerId
from tandem.sampling import SamplingParams
from tandem.worker import Role
from tandem.worker_config import WorkerConfig

DECODE_SHARE = 0.75
PREFILL_SHARE = 0.60


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the engine: decode batches at a context, and one prompt."""

    batches: tuple[int, ...] = (1, 64)
    context_tokens: int = 1024
    prompt_tokens: int = 8192
    block_size: int = 16
    rounds: int = 20


async def llama_steps() -> list[GpuFigure]:
    """Steps of the whole model in bfloat16, through graphs and the attention that was chosen."""
    limits = device_limits()
    return step_figures(LLAMA_3_8B, torch.bfloat16, CudaAccelerator("cuda"), limits, Load())


def step_figures(
    config: ModelConfig, dtype: torch.dtype, accelerator: Accelerator, limits: DeviceLimits, load: Load
) -> list[GpuFigure]:
    """Each kind of step beside the least time that reading, or multiplying, takes at the limits."""
    weights = random_weights(config, dtype, accelerator.device, seed=1)
    worker = _worker(dtype, load)
    computing = load_on_device(worker, config, weights, dtype, accelerator, _no_draft_model, None)
    name = f"{config.layers} layers of {config.hidden_size}"
    figures = []
    with computing.cache:
        for batch in load.batches:
            step_s = _median_s(computing, _decode(batch, load), load.rounds)
            held = read_parameters(config) + kv_elements_per_token(config) * load.context_tokens * batch
            floor_s = held * dtype.itemsize / limits.bytes_s
            what = f"decode of {name}, batch {batch} at {load.context_tokens} tokens"
            figures.append(_beside(what, step_s, floor_s, DECODE_SHARE, "the bandwidth floor"))
        step_s = _median_s(computing, _prefill(load), load.rounds)
        floor_s = prefill_flops(config, load.prompt_tokens) / limits.flop_s
        what = f"prefill of {name}, {load.prompt_tokens} tokens"
        figures.append(_beside(what, step_s, floor_s, PREFILL_SHARE, "the rate of a matrix product"))
    return figures


def _beside(what: str, step_s: float, floor_s: float, share: float, limit: str) -> GpuFigure:
    text = f"{step_s * 1e3:.2f} ms, {floor_s / step_s:.2f} of {limit} ({floor_s * 1e3:.2f} ms)"
    return GpuFigure(what, text, f">= {share:.2f}", floor_s >= share * step_s)


def _worker(dtype: torch.dtype, load: Load) -> WorkerConfig:
    blocks = -(-load.context_tokens // load.block_size) * max(load.batches)
    prompt_blocks = -(-load.prompt_tokens // load.block_size)
    return WorkerConfig(
        worker_id=WorkerId("check"),
        incarnation=Incarnation(1),
        role=Role.MIXED,
        model_folder=Path(),
        model_name="random",
        pool_blocks=max(blocks, prompt_blocks),
        block_size=load.block_size,
        dtype=str(dtype).removeprefix("torch."),
        context_tokens=max(load.context_tokens, load.prompt_tokens),
        token_budget=load.prompt_tokens,
        max_batch=max(load.batches),
    )


def _no_draft_model(_: WorkerConfig, __: Sampler) -> SmallEngine:
    raise ConfigError("A model of random weights has no draft model.")


def _decode(batch: int, load: Load) -> StepPlan:
    """Each sequence feeds its last token; blocks are scattered over the pool."""
    blocks = -(-load.context_tokens // load.block_size)
    return StepPlan(
        0,
        tuple(
            SequenceSlice(
                [7 + key],
                load.context_tokens - 1,
                [BlockId(block * batch + key) for block in range(blocks)],
                (_drawn(key),),
            )
            for key in range(batch)
        ),
    )


def _prefill(load: Load) -> StepPlan:
    table = [BlockId(block) for block in range(-(-load.prompt_tokens // load.block_size))]
    return StepPlan(0, (SequenceSlice([5] * load.prompt_tokens, 0, table, (_drawn(0),)),))


def _drawn(key: int) -> SampleRequest:
    return SampleRequest(key, 0, 0, SamplingParams(temperature=0.8, seed=key))


def _median_s(computing: Computing, plan: StepPlan, rounds: int) -> float:
    times: Sequence[float] = [computing.runner.run(plan).compute_s for _ in range(rounds + 1)][1:]
    return statistics.median(times)
