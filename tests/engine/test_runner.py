"""A step plan is carried out: copies first, then slices, and tokens in the plan's order."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.loading import load_engine
from engine.step import SampleRequest, SequenceSlice, StepPlan
from tandem.digest import compatibility_digest
from tandem.errors import ConfigError, ModelError, ProtocolError
from tandem.ids import BlockId, Incarnation, WorkerId
from tandem.worker import Role
from tandem.worker_config import WorkerConfig
from tests.engine.tiny_models import (
    GREEDY,
    Engine,
    family_configs,
    open_engine,
    random_model,
    reference_logits,
    slice_of,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    random_model(family_configs()["llama"]).save_pretrained(path)
    return path


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with open_engine(folder) as opened:
        yield opened


def worker_config(folder: Path, dtype: str = "float32", device: str = "cpu") -> WorkerConfig:
    return WorkerConfig(
        WorkerId("w"), Incarnation(1), Role.MIXED, folder, "tiny", pool_blocks=8, dtype=dtype, device=device
    )


def test_tokens_come_in_the_order_of_slices_and_samples(engine: Engine) -> None:
    plan = StepPlan(
        7,
        (
            slice_of([5, 6, 7], 0, [3], samples=3, key=11),
            slice_of([1, 2], 0, [4], samples=0, key=12),
            slice_of([9], 0, [5], samples=1, key=13),
        ),
    )
    result = engine.runner.run(plan)
    assert result.step == 7
    assert result.compute_s > 0
    assert [(token.key, token.sample_index) for token in result.tokens] == [
        (11, 0),
        (11, 1),
        (11, 2),
        (13, 0),
    ]
    assert torch.equal(engine.sampler.logits[0], engine.sampler.logits[2])
    assert len({token.token_id for token in result.tokens[:3]}) == 1


def test_a_layer_that_is_reported_is_in_the_cache_and_later_ones_are_not(engine: Engine) -> None:
    engine.cache.pool.zero_()
    written: list[tuple[int, list[bool]]] = []

    def note(layers: int) -> None:
        block = engine.cache.pool[3]
        written.append((layers, [bool(block[layer].any()) for layer in range(block.shape[0])]))

    engine.runner.run(StepPlan(1, (slice_of([5, 6, 7], 0, [3]),)), note)
    layers = engine.cache.pool.shape[1]
    assert written == [(n, [layer < n for layer in range(layers)]) for n in range(1, layers + 1)]


def test_copied_block_continues_the_same_sequence(folder: Path) -> None:
    """Copy-on-write: after the copy both sequences go their own ways over a shared first block."""
    prompt = [5, 6, 7, 8, 9, 10]
    with open_engine(folder) as engine:
        engine.step(slice_of(prompt, 0, [3, 4], samples=0))
        plan = StepPlan(
            1,
            (slice_of([20], 6, [3, 4], key=0), slice_of([30], 6, [3, 9], key=1)),
            copies=((BlockId(4), BlockId(9)),),
        )
        engine.runner.run(plan)
        found = engine.sampler.logits
        reference = random_model(family_configs()["llama"])
        for row, token in enumerate((20, 30)):
            expected = reference_logits(reference, [*prompt, token])[-1]
            assert (found[row] - expected).abs().max().item() < 1e-4


def test_a_plan_of_copies_only_draws_nothing(engine: Engine) -> None:
    engine.cache.pool[1].fill_(3.0)
    result = engine.runner.run(StepPlan(0, (), ((BlockId(1), BlockId(2)),)))
    assert result.tokens == ()
    assert float(engine.cache.pool[2].min()) == 3.0


def test_a_slice_writes_only_its_own_positions(engine: Engine) -> None:
    engine.cache.pool.fill_(7.0)
    engine.step(slice_of([1, 2, 3], 5, [10, 11, 12], samples=0))
    untouched = torch.ones_like(engine.cache.pool, dtype=torch.bool)
    untouched[11, :, :, 1:4] = False
    assert bool((engine.cache.pool[untouched] == 7.0).all())
    assert not bool((engine.cache.pool[11, :, :, 1:4] == 7.0).any())


def test_a_slice_without_tokens_is_a_protocol_error(engine: Engine) -> None:
    with pytest.raises(ProtocolError, match="without tokens"):
        engine.runner.run(StepPlan(0, (SequenceSlice((), 0, [BlockId(1)], ()),)))


def test_a_short_block_table_is_refused(engine: Engine) -> None:
    with pytest.raises(IndexError):
        engine.runner.run(StepPlan(0, (slice_of([1, 2, 3, 4, 5], 0, [1]),)))


def test_a_new_thread_computes_with_the_threads_it_was_given(engine: Engine) -> None:
    torch.set_num_threads(2)
    seen: list[int] = []

    def run() -> None:
        engine.runner.run(StepPlan(0, (slice_of([1], 0, [1]),)))
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=30)
    assert seen == [1]


def test_loaded_engine_draws_and_gives_its_memory_back(folder: Path) -> None:
    config = worker_config(folder)
    seen: list[tuple[int, int]] = []
    with load_engine(config, lambda done, total: seen.append((done, total))) as loaded:
        request = SampleRequest(1, 0, 0, GREEDY)
        result = loaded.runner.run(StepPlan(0, (SequenceSlice([4, 5], 0, [BlockId(2)], (request,)),)))
        reference = reference_logits(random_model(family_configs()["llama"]), [4, 5])[-1]
        assert [token.token_id for token in result.tokens] == [int(reference.argmax())]
        assert loaded.cache.num_blocks == 8
        assert loaded.eos_ids == (2,)
        assert loaded.context_tokens == 256
        assert loaded.digest == compatibility_digest(folder, "float32", 16)
    assert loaded.cache.fileno() is None
    assert seen[-1][0] == seen[-1][1] > 0


def test_unsupported_dtype_and_device_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype 'int4' is not supported; supported: float32, bfloat16"):
        load_engine(worker_config(folder, dtype="int4"))
    with pytest.raises(ConfigError, match=r"device 'tpu' is not supported; supported: cpu"):
        load_engine(worker_config(folder, device="tpu"))


def test_a_missing_folder_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_engine(worker_config(tmp_path / "none"))
