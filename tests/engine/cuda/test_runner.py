"""The CUDA step runner gives the tokens of the CPU's, by every attention and with or without graphs.

Without a GPU its kernels run in Triton's interpreter and a "graph" calls its work again.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.cpu.attention import CpuAttention
from engine.cpu.linear import stored_linear
from engine.cuda.attention import GatherAttention, PagedAttention, TritonAttention
from engine.cuda.decoder import CudaDecoder
from engine.cuda.flashinfer_attention import FlashInferAttention
from engine.cuda.graphs import Capture, CudaCapture, DecodeGraphs
from engine.cuda.runner import CudaStepRunner
from engine.decoder import Decoder
from engine.drafting.draft import ROOT, Draft
from engine.kv.kv_cache import KvCache
from engine.models.model_config import ModelConfig, read_model_config
from engine.models.weights import read_weights
from engine.sampling.sampler import Sampler
from engine.step import PENDING, SampleRequest, SequenceSlice, StepPlan, StepResult
from engine.torch_runner import TorchStepRunner
from tandem.errors import ProtocolError
from tandem.ids import BlockId
from tandem.sampling import SamplingParams
from tests.engine.cuda import flashinfer_stand_in
from tests.engine.cuda.host_accelerator import AgainCapture
from tests.engine.tiny_models import family_configs, random_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
BLOCKS, BLOCK_SIZE, TABLE = 40, 4, 12
FAMILIES = ["mistral-window", "qwen2", "qwen3", "llama-biased"]

Maker = Callable[[Tensor, ModelConfig], PagedAttention]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    random_model(family_configs()[request.param]).save_pretrained(path)
    return path


def cpu_runner(folder: Path) -> TorchStepRunner:
    config = read_model_config(folder)
    weights = read_weights(folder, config, torch.float32, CPU)
    cache = KvCache(config, BLOCKS, BLOCK_SIZE, torch.float32, CPU)
    attention = CpuAttention(cache, config)
    decoder = Decoder(config, weights, stored_linear)
    return TorchStepRunner(decoder, cache, attention, Sampler(config.vocabulary_tokens), CPU, 1)


def cuda_runner(folder: Path, make: Maker, graphs: bool) -> CudaStepRunner:
    config = read_model_config(folder)
    weights = read_weights(folder, config, torch.float32, DEVICE)
    cache = KvCache(config, BLOCKS + 1, BLOCK_SIZE, torch.float32, DEVICE)
    decoder = CudaDecoder(config, weights)
    attention = make(cache.pool, config)
    captured = None
    if graphs:
        capture: Capture = CudaCapture() if DEVICE.type == "cuda" else AgainCapture()
        slot = BLOCKS * config.layers * 2 * BLOCK_SIZE
        captured = DecodeGraphs(decoder, attention, capture, (1, 2, 4), TABLE, BLOCKS, slot, DEVICE)
        with torch.inference_mode():
            captured.capture_all(within_s=60.0)
    branching = GatherAttention(cache.pool, config)
    sampler = Sampler(config.vocabulary_tokens)
    return CudaStepRunner(decoder, cache, config.layers, attention, branching, sampler, captured)


def triton(pool: Tensor, config: ModelConfig) -> PagedAttention:
    return TritonAttention(pool, config, max_batch=4, splits=2)


def flashinfer(pool: Tensor, config: ModelConfig) -> PagedAttention:
    return FlashInferAttention(pool, config, (1, 2, 4), TABLE, library=flashinfer_stand_in)


def steps_of(seed: int) -> list[StepPlan]:
    """Three sequences: read in chunks, one of them while another decodes; then all three decode."""
    draw = random.Random(seed)
    order = draw.sample(range(BLOCKS), 30)
    tables = [[BlockId(block) for block in order[at : at + 10]] for at in (0, 10, 20)]
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, seed=5),
        SamplingParams(temperature=0.7, seed=6, top_k=9, logprobs=2),
    ]

    def part(key: int, start: int, count: int, draws: bool) -> SequenceSlice:
        tokens = [draw.randrange(101) for _ in range(count)]
        request = SampleRequest(key, 0, start + count, replace(params[key]))
        return SequenceSlice(tokens, start, tables[key], (request,) if draws else ())

    return [
        StepPlan(1, (part(0, 0, 9, False), part(1, 0, 5, True))),
        StepPlan(2, (part(0, 9, 4, True), part(1, 5, 1, True), part(2, 0, 17, True))),
        StepPlan(3, (part(0, 13, 1, True), part(1, 6, 1, True), part(2, 17, 1, True))),
        StepPlan(4, (part(1, 7, 1, True),), ((tables[0][0], tables[2][9]),)),
    ]


def token_ids(result: StepResult) -> list[tuple[int, int, int]]:
    return [(token.key, token.token_id, token.row) for token in result.tokens]


@pytest.mark.parametrize(
    ("make", "graphs"),
    [(triton, True), (flashinfer, True), (GatherAttention, False)],
    ids=["triton-graphs", "flashinfer-graphs", "sdpa"],
)
def test_tokens_are_those_of_the_cpu(folder: Path, make: Maker, graphs: bool) -> None:
    reference, runner = cpu_runner(folder), cuda_runner(folder, make, graphs)
    for plan in steps_of(seed=3):
        assert token_ids(runner.run(plan)) == token_ids(reference.run(plan))


def following(request: SampleRequest, start: int, table: list[BlockId]) -> SequenceSlice:
    return SequenceSlice((PENDING,), start, table, (request,), follows=True)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no-graphs"])
def test_a_step_that_follows_feeds_what_the_one_before_draws(folder: Path, graphs: bool) -> None:
    """Two samples, one of which asks for logprobs once; each step is begun before the last one's result."""
    runner, reference = cuda_runner(folder, triton, graphs), cuda_runner(folder, triton, graphs=False)
    tables = [[BlockId(block) for block in range(first, 20, 2)] for first in (0, 1)]
    plain = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, seed=5)]
    prompt = tuple(
        SequenceSlice(range(3, 8 + key), 0, tables[key], (SampleRequest(key, 0, 0, plain[key]),))
        for key in (0, 1)
    )
    known = {token.key: token.token_id for token in reference.run(StepPlan(0, prompt)).tokens}
    in_flight = [runner.begin(StepPlan(0, prompt))]
    for step in range(1, 6):
        params = [plain[0], replace(plain[1], logprobs=1) if step == 3 else plain[1]]
        slices = [
            SequenceSlice(
                (PENDING,),
                4 + key + step,
                tables[key],
                (SampleRequest(key, 0, step, params[key]),),
                follows=True,
            )
            for key in ((0, 1) if step != 5 else (1,))
        ]
        in_flight.append(runner.begin(StepPlan(step, tuple(slices))))
        drawn = {token.key: token.token_id for token in in_flight.pop(0).result().tokens}
        assert drawn == known
        told = [replace(part, token_ids=(known[part.samples[0].key],), follows=False) for part in slices]
        known = {token.key: token.token_id for token in reference.run(StepPlan(step, tuple(told))).tokens}
    assert {token.key: token.token_id for token in in_flight.pop().result().tokens} == known


def test_nothing_follows_a_step_that_drew_nothing(folder: Path) -> None:
    runner = cuda_runner(folder, triton, graphs=False)
    runner.run(StepPlan(1, (SequenceSlice([1, 2], 0, [BlockId(0)], ()),)))
    request = SampleRequest(0, 0, 1, SamplingParams(temperature=0.0))
    plan = StepPlan(2, (following(request, 2, [BlockId(0)]),))
    with pytest.raises(ProtocolError, match="draws no token"):
        runner.begin(plan)


def test_a_batch_beyond_every_bucket_runs_without_a_graph(folder: Path) -> None:
    reference, runner = cpu_runner(folder), cuda_runner(folder, triton, graphs=True)
    request = SampleRequest(0, 0, 1, SamplingParams(temperature=0.0))
    slices = tuple(
        SequenceSlice([7 + place], 0, [BlockId(place)], (replace(request, key=place),)) for place in range(5)
    )
    plan = StepPlan(1, slices)
    assert token_ids(runner.run(plan)) == token_ids(reference.run(plan))


def test_a_short_block_table_is_an_error(folder: Path) -> None:
    runner = cuda_runner(folder, triton, graphs=False)
    with pytest.raises(IndexError, match="too short"):
        runner.run(StepPlan(1, (SequenceSlice([1] * 5, 0, [BlockId(0)], ()),)))


def test_each_branch_of_a_tree_sees_itself_alone(folder: Path) -> None:
    """As on the CPU, where test_verification holds it to the model: one token after each guess."""
    reference, runner = cpu_runner(folder), cuda_runner(folder, triton, graphs=True)
    table = [BlockId(block) for block in (9, 3, 5, 7)]
    tree = Draft((20, 21, 22, 30, 31, 23), (ROOT, 0, 1, ROOT, 3, 1))
    chain = Draft((40, 41))
    plans = [
        StepPlan(1, (SequenceSlice((5, 6, 7, 8, 9), 0, table, ()),)),
        StepPlan(2, (verified(0, (10, 11), 5, table, tree), verified(1, (12,), 0, [BlockId(11)], chain))),
    ]
    for plan in plans:
        assert token_ids(runner.run(plan)) == token_ids(reference.run(plan))


def verified(
    key: int, tokens: tuple[int, ...], start: int, table: list[BlockId], draft: Draft
) -> SequenceSlice:
    params = SamplingParams(temperature=0.9, seed=7)
    rows = range(-1 - len(draft), 0)
    samples = tuple(SampleRequest(key, 0, place, params, row=row) for place, row in enumerate(rows))
    return SequenceSlice((*tokens, *draft.token_ids), start, table, samples, draft)


def test_layers_are_told_in_order(folder: Path) -> None:
    runner = cuda_runner(folder, triton, graphs=True)
    told: list[int] = []
    runner.run(StepPlan(1, (SequenceSlice((5, 6, 7), 0, [BlockId(0)], ()),)), told.append)
    assert told == [1, 2, 3]
