"""A model is put on a device with the attention, the pool and the graphs that fit it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.computing import Computing
from engine.cuda.attention_choice import ATTENTIONS, AUTO, choose_attention
from engine.cuda.loading import MEMORY_SHARE, dry_run_plan, load_on_device
from engine.cuda.memory_plan import GRAPH_BYTES
from engine.loading import LoadedEngine, load_engine
from engine.models.model_config import ModelConfig, read_model_config
from engine.models.weights import read_weights
from engine.step import SampleRequest, SequenceSlice, StepPlan
from tandem.errors import ConfigError
from tandem.ids import BlockId, Incarnation, WorkerId
from tandem.sampling import SamplingParams
from tandem.worker import Role
from tandem.worker_config import SpeculativeConfig, WorkerConfig
from tests.engine.cuda.host_accelerator import HostAccelerator
from tests.engine.tiny_models import family_configs, random_model

TOTAL, PEAK = 2**31, 10**6
GREEDY = SamplingParams(temperature=0.0)
ALL = ("flashinfer", "triton")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model(family_configs()["llama"]).save_pretrained(path)
    return path


@pytest.fixture
def worker(folder: Path) -> WorkerConfig:
    return WorkerConfig(
        WorkerId("w"),
        Incarnation(1),
        Role.DECODE,
        folder,
        "tiny",
        pool_blocks=12,
        block_size=4,
        context_tokens=32,
        token_budget=8,
        max_batch=2,
    )


def no_small(_: WorkerConfig, __: object) -> LoadedEngine:
    raise AssertionError("no draft model was asked for")


def load(worker: WorkerConfig, accelerator: HostAccelerator) -> Computing:
    model = read_model_config(worker.model_folder)
    weights = read_weights(worker.model_folder, model, torch.float32, torch.device("cpu"))
    computing = load_on_device(worker, model, weights, torch.float32, accelerator, no_small, None)
    assert not weights, "joined weights must not be held twice"
    return computing


def tokens_of(runner: LoadedEngine | Computing, feeds: Sequence[Sequence[int]]) -> list[int]:
    drawn = []
    start = 0
    table = [BlockId(3), BlockId(1), BlockId(5)]
    for step, feed in enumerate(feeds):
        request = SampleRequest(0, 0, step, GREEDY)
        result = runner.runner.run(StepPlan(step, (SequenceSlice(feed, start, table, (request,)),)))
        drawn += [token.token_id for token in result.tokens]
        start += len(feed)
    return drawn


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_loaded_engine_draws_the_tokens_of_the_cpu(worker: WorkerConfig, attention: str) -> None:
    feeds = ([5, 6, 7, 8, 9], [10], [11])
    accelerator = HostAccelerator(TOTAL, TOTAL, PEAK)
    computing = load(replace(worker, attention=attention), accelerator)
    with load_engine(worker) as reference, computing.cache:
        assert tokens_of(computing, feeds) == tokens_of(reference, feeds)
    assert accelerator.captures == (attention == "auto")


def test_a_prefill_worker_captures_no_graphs(worker: WorkerConfig) -> None:
    accelerator = HostAccelerator(TOTAL, TOTAL, PEAK)
    with load(replace(worker, role=Role.PREFILL), accelerator).cache:
        assert accelerator.captures == 0


def test_a_pool_takes_what_model_and_largest_step_leave(worker: WorkerConfig) -> None:
    used = 100 * 10**6
    small = HostAccelerator(GRAPH_BYTES + 10**7 - used, GRAPH_BYTES + 10**7, PEAK)
    with pytest.raises(ConfigError, match="bytes are missing"):
        load(replace(worker, pool_blocks=0), small)
    total = int((GRAPH_BYTES + used + PEAK + 2 * 10**6) / MEMORY_SHARE)
    with load(replace(worker, pool_blocks=0), HostAccelerator(total - used, total, PEAK)).cache as cache:
        room = 2 * 10**6 + cache.block_bytes  # the dry run's own block is free again
        assert -1 <= room - cache.num_blocks * cache.block_bytes <= cache.block_bytes


def test_one_block_of_the_cache_is_for_padding_alone(worker: WorkerConfig) -> None:
    computing = load(worker, HostAccelerator(TOTAL, TOTAL, PEAK))
    with computing.cache:
        assert (computing.pool_blocks, computing.cache.num_blocks) == (12, 13)


@pytest.mark.parametrize(("budget", "batch"), [(8, 2), (9, 4), (2, 8), (512, 64)])
def test_the_dry_run_is_as_large_as_a_step_may_be(budget: int, batch: int) -> None:
    plan, blocks = dry_run_plan(budget, batch, block_size=16)
    assert sum(len(part.token_ids) for part in plan.slices) == max(budget, batch)
    assert len(plan.slices) == batch
    assert {block for part in plan.slices for block in part.block_table} == set(range(blocks))


def test_a_device_that_is_not_here_is_a_config_error(worker: WorkerConfig) -> None:
    with pytest.raises(ConfigError, match="torch finds"):
        load_engine(replace(worker, device="cuda:99"))


def test_cpu_needs_a_number_of_blocks(worker: WorkerConfig) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        load_engine(replace(worker, pool_blocks=0))


def test_eagle_stays_on_the_cpu(worker: WorkerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostAccelerator, "device", torch.device("meta"))
    with pytest.raises(ConfigError, match="CPU only"):
        load(
            replace(worker, speculative=SpeculativeConfig("eagle", 4, "none")),
            HostAccelerator(TOTAL, TOTAL, PEAK),
        )


@pytest.fixture
def model(folder: Path) -> ModelConfig:
    return replace(read_model_config(folder), head_dim=128)


def test_flashinfer_is_taken_where_it_can_run(model: ModelConfig) -> None:
    assert choose_attention(AUTO, model, "bfloat16", (9, 0), ALL).capability.name == "flashinfer"


@pytest.mark.parametrize(
    ("head_dim", "dtype", "installed", "why"),
    [
        (128, "bfloat16", ("triton",), "not installed"),
        (96, "bfloat16", ALL, "heads of 96"),
        (128, "float32", ALL, "float32"),
    ],
)
def test_triton_is_taken_where_flashinfer_cannot_run(
    model: ModelConfig, head_dim: int, dtype: str, installed: tuple[str, ...], why: str
) -> None:
    choice = choose_attention(AUTO, replace(model, head_dim=head_dim), dtype, (9, 0), installed)
    assert choice.capability.name == "triton"
    assert why in choice.reason


def test_an_old_device_falls_back_to_sdpa(model: ModelConfig) -> None:
    choice = choose_attention(AUTO, model, "bfloat16", (7, 5), ALL)
    assert choice.capability.name == "sdpa"
    assert "7.5" in choice.reason


def test_a_named_attention_that_cannot_run_is_an_error(model: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="not installed"):
        choose_attention("flashinfer", model, "bfloat16", (9, 0), ())
    with pytest.raises(ConfigError, match="unknown"):
        choose_attention("flash", model, "bfloat16", (9, 0), ALL)


def test_one_attention_verifies_trees() -> None:
    assert [able.name for able in ATTENTIONS if able.trees] == ["sdpa"]
