"""On a real device: what is loaded there draws the tokens of the CPU, with and without graphs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_engine import Load, step_figures
from benchmarks.gpu_kernels import LLAMA_3_8B, DeviceLimits
from engine.computing import Computing
from engine.contract import StepRunner
from engine.cpu.attention import CpuAttention
from engine.cpu.linear import stored_linear
from engine.cuda.accelerator import CudaAccelerator
from engine.cuda.loading import load_on_device
from engine.decoder import Decoder
from engine.drafting.loading import SmallEngine
from engine.kv.kv_cache import KvCache
from engine.models.random_weights import random_weights
from engine.sampling.sampler import Sampler
from engine.step import SampleRequest, SequenceSlice, StepPlan
from engine.torch_runner import TorchStepRunner
from tandem.errors import ConfigError
from tandem.ids import BlockId, Incarnation, WorkerId
from tandem.sampling import SamplingParams
from tandem.worker import Role
from tandem.worker_config import WorkerConfig

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
SHAPE = replace(
    LLAMA_3_8B,
    vocabulary_tokens=1000,
    hidden_size=128,
    intermediate_size=256,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=64,
    context_tokens=256,
    windows=(None,) * 3,
)
WORKER = WorkerConfig(
    WorkerId("w"),
    Incarnation(1),
    Role.MIXED,
    Path(),
    "tiny",
    pool_blocks=64,
    context_tokens=256,
    token_budget=64,
    max_batch=4,
)


def no_draft_model(_: WorkerConfig, __: Sampler) -> SmallEngine:
    raise ConfigError("there is no draft model")


def on_gpu(worker: WorkerConfig) -> Computing:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[worker.dtype]
    accelerator = CudaAccelerator("cuda")
    weights = {name: held.to("cuda", dtype) for name, held in random_weights(SHAPE, dtype, CPU, 3).items()}
    return load_on_device(worker, SHAPE, weights, dtype, accelerator, no_draft_model, None)


def on_cpu() -> TorchStepRunner:
    cache = KvCache(SHAPE, 64, WORKER.block_size, torch.float32, CPU)
    decoder = Decoder(SHAPE, random_weights(SHAPE, torch.float32, CPU, 3), stored_linear)
    attention = CpuAttention(cache, SHAPE)
    return TorchStepRunner(decoder, cache, attention, Sampler(SHAPE.vocabulary_tokens), CPU, 1)


def generated(runner: StepRunner, steps: int) -> list[list[int]]:
    """Three prompts read together, the second in two chunks; then all decode, one greedily."""
    prompts = [[5, 6, 7], [*range(10, 50)], [3] * 20]
    params = [SamplingParams(temperature=0.0), SamplingParams(seed=1), SamplingParams(seed=2, top_k=5)]
    tables = [[BlockId(key + 3 * block) for block in range(6)] for key in range(3)]
    outputs: list[list[int]] = [[], [], []]

    def request(key: int) -> tuple[SampleRequest, ...]:
        return (SampleRequest(key, 0, len(outputs[key]), params[key]),)

    def take(*slices: SequenceSlice) -> None:
        for token in runner.run(StepPlan(0, slices)).tokens:
            outputs[token.key].append(token.token_id)

    take(
        SequenceSlice(prompts[1][:33], 0, tables[1], ()), SequenceSlice(prompts[0], 0, tables[0], request(0))
    )
    take(
        SequenceSlice(prompts[1][33:], 33, tables[1], request(1)),
        SequenceSlice(prompts[2], 0, tables[2], request(2)),
    )
    for step in range(1, steps):
        take(
            *(
                SequenceSlice(outputs[key][-1:], len(prompts[key]) + step - 1, tables[key], request(key))
                for key in range(3)
            )
        )
    return outputs


@pytest.mark.parametrize("attention", ["triton", "sdpa"])
@pytest.mark.parametrize("role", [Role.MIXED, Role.PREFILL], ids=["graphs", "eager"])
def test_float32_tokens_are_those_of_the_cpu(attention: str, role: Role) -> None:
    computing = on_gpu(replace(WORKER, attention=attention, role=role))
    with computing.cache:
        assert generated(computing.runner, 12) == generated(on_cpu(), 12)


def test_graphs_draw_what_eager_steps_draw_in_bfloat16() -> None:
    worker = replace(WORKER, dtype="bfloat16", attention="triton")
    graphs, eager = on_gpu(worker), on_gpu(replace(worker, role=Role.PREFILL))
    with graphs.cache, eager.cache:
        assert generated(graphs.runner, 12) == generated(eager.runner, 12)


def test_flashinfer_draws_what_triton_draws() -> None:
    pytest.importorskip("flashinfer")
    runs = []
    for attention in ("flashinfer", "triton"):
        computing = on_gpu(replace(WORKER, dtype="bfloat16", attention=attention))
        with computing.cache:
            runs.append(generated(computing.runner, 1))
    assert runs[0] == runs[1]


def test_layers_are_told_in_order_and_the_pool_is_written_when_a_step_returns() -> None:
    computing = on_gpu(WORKER)
    told: list[int] = []
    with computing.cache as cache:
        plan = StepPlan(0, (SequenceSlice([5] * 40, 0, [BlockId(2), BlockId(1), BlockId(7)], ()),))
        computing.runner.run(plan, told.append)
        assert told == [1, 2, 3]
        assert bool(cache.pool[7, :, :, :8].any())
        assert cache.device_index == 0


def test_a_pool_of_what_fits_leaves_memory_free() -> None:
    computing = on_gpu(replace(WORKER, pool_blocks=0))
    with computing.cache:
        free, total = torch.cuda.mem_get_info()
        assert computing.pool_blocks > 64
        assert free > 0.05 * total


def test_the_checks_of_steps_run() -> None:
    load = Load(batches=(1, 4), context_tokens=64, prompt_tokens=128)
    figures = step_figures(SHAPE, torch.bfloat16, CudaAccelerator("cuda"), DeviceLimits(1e12, 1e14), load)
    assert len(figures) == 3
