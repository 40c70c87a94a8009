"""Weights of eight bits: products near the exact ones, each row by itself, refused where sums overflow."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.cpu.int8_linear import Int8Linear, int8_linear
from engine.loading import load_engine
from tandem.digest import compatibility_digest
from tandem.errors import ConfigError
from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role
from tandem.worker_config import WorkerConfig
from tests.engine.tiny_models import family_configs, open_engine, random_model, reference_logits, slice_of

pytestmark = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="needs a processor with VNNI")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(rows: Tensor) -> Tensor:
    """Each row in steps of a 127th of its largest number, in float64."""
    steps = rows.double().abs().amax(1, keepdim=True) / 127
    return (rows.double() / steps).round() * steps


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_product_is_that_of_rows_and_weights_rounded_to_127_steps(count: int, biased: bool) -> None:
    weight, rows = normal(48, 64, seed=1), normal(count, 64, seed=2)
    bias = normal(48, seed=3) if biased else None
    expected = rounded(rows) @ rounded(weight).t()
    expected = expected if bias is None else expected + bias.double()
    torch.testing.assert_close(Int8Linear(weight, bias)(rows).double(), expected, rtol=1e-4, atol=1e-3)


def test_rows_of_very_different_size_keep_their_precision() -> None:
    weight = normal(48, 64, seed=1)
    rows = normal(3, 64, seed=2) * torch.tensor([[1e-6], [1.0], [1e6]])
    exact = rows.double() @ weight.double().t()
    errors = (Int8Linear(weight, None)(rows).double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert errors.max() < 0.02


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    linear = int8_linear(normal(96, 64, seed=1), None)
    rows = normal(33, 64, seed=2)
    rows[5] *= 1000
    together = linear(rows)
    alone = torch.cat([linear(row[None]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_rows_and_channels_of_zeros_give_zeros() -> None:
    weight = normal(48, 64, seed=1)
    weight[3] = 0
    product = Int8Linear(weight, None)(torch.cat((torch.zeros(1, 64), torch.ones(1, 64))))
    assert product[0].abs().max() == 0
    assert product[1, 3] == 0
    assert product.isfinite().all()


def test_bfloat16_stays_bfloat16() -> None:
    weight, rows = normal(48, 64, seed=1).bfloat16(), normal(5, 64, seed=2).bfloat16()
    product = Int8Linear(weight, None)(rows)
    assert product.dtype == torch.bfloat16
    exact = rows.double() @ weight.double().t()
    assert (product.double() - exact).norm() / exact.norm() < 0.02


def test_neither_the_rows_nor_the_weight_are_changed() -> None:
    weight, rows = normal(48, 64, seed=1), normal(5, 64, seed=2)
    kept = weight.clone(), rows.clone()
    Int8Linear(weight, None)(rows)
    assert torch.equal(weight, kept[0])
    assert torch.equal(rows, kept[1])


def test_without_vnni_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """There oneDNN's sums of bytes may overflow."""
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    with pytest.raises(ConfigError, match="needs a processor with VNNI"):
        Int8Linear(torch.ones(8, 8), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    random_model(family_configs()["llama"]).save_pretrained(path)
    return path


def test_a_decoder_of_bytes_is_near_the_one_of_floats(folder: Path) -> None:
    prompt = [3, 17, 40, 9, 28, 33, 6, 51]
    with open_engine(folder, product=int8_linear) as engine:
        found = engine.step(slice_of(prompt, 0, [7, 2]))
    expected = reference_logits(random_model(family_configs()["llama"]), prompt)[-1:]
    assert torch.nn.functional.cosine_similarity(found, expected).item() > 0.99
    assert not torch.equal(found, expected)


def test_workers_with_other_weights_do_not_pair(folder: Path) -> None:
    config = WorkerConfig(WorkerId("w"), Incarnation(1), Role.MIXED, folder, "tiny", pool_blocks=8)
    with load_engine(replace(config, weights_dtype="int8")) as engine:
        narrow = engine.digest
    assert narrow == compatibility_digest(folder, "float32", 16, weights_dtype="int8")
    assert narrow != compatibility_digest(folder, "float32", 16)


@pytest.mark.parametrize(("weights_dtype", "device"), [("int4", "cpu"), ("int8", "cuda")])
def test_other_types_and_devices_are_refused(folder: Path, weights_dtype: str, device: str) -> None:
    config = WorkerConfig(
        *(WorkerId("w"), Incarnation(1), Role.MIXED, folder, "tiny"),
        pool_blocks=8,
        weights_dtype=weights_dtype,
        device=device,
    )
    with pytest.raises(ConfigError, match=rf"{weights_dtype}.* on {device} is not .*: int8 on cpu"):
        load_engine(config)
