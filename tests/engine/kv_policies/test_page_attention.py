"""Attention over pages is attention: every family's logits, however tokens are cut into steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kv_policies.page_attention import Reading
from tests.engine.kv_policies.page_engine import open_pages, scattered, tokens
from tests.engine.tiny_models import family_configs, random_model, reference_logits, slice_of

TOLERANCE = 1e-4
STORED = {"float32": torch.float32, "int8": torch.int8}


@pytest.fixture(scope="module", params=sorted(family_configs()))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A family's tiny model on disk, and transformers' own object."""
    model = random_model(family_configs()[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny Llama on disk, and transformers' own object in float64."""
    model = random_model(family_configs()["llama"])
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model.double()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pages", [None, 20], ids=["full", "quest with more pages than there are"])
def test_logits_are_those_of_full_attention(saved: tuple[Path, Any], pages: int | None, threads: int) -> None:
    folder, model = saved
    sequence, table = tokens(70, seed=1), scattered(20, seed=1)
    expected = reference_logits(model, sequence)
    with open_pages(folder, reading=Reading(pages), threads=threads) as engine:
        found = [engine.step(slice_of(sequence[:64], 0, table))]
        found += [engine.step(slice_of(sequence[at : at + 1], at, table)) for at in range(64, 70)]
    assert (torch.cat(found) - expected[63:]).abs().max() < TOLERANCE


def test_sequences_of_a_batch_do_not_touch_each_other(saved: tuple[Path, Any]) -> None:
    folder, model = saved
    lengths = (3, 17, 40)
    sequences = [tokens(length + 4, seed=length) for length in lengths]
    blocks = scattered(33, seed=2)
    tables = [blocks[:11], blocks[11:22], blocks[22:]]
    with open_pages(folder, reading=Reading(20)) as engine:
        for sequence, length, table in zip(sequences, lengths, tables, strict=True):
            engine.step(slice_of(sequence[:length], 0, table, samples=0))
        found = engine.step(
            slice_of(sequences[2][40:41], 40, tables[2]),
            slice_of(sequences[1][17:20], 17, tables[1]),
            slice_of(sequences[0][3:4], 3, tables[0]),
        )
    ends = ((2, 41), (1, 20), (0, 4))
    expected = torch.stack([reference_logits(model, sequences[which][:end])[-1] for which, end in ends])
    assert (found - expected).abs().max() < TOLERANCE


def test_eight_bit_logits_are_near_those_of_float64(llama: tuple[Path, Any]) -> None:
    """Errors as parts of the logits' standard deviation; float32 makes next to none."""
    folder, model = llama
    sequence, table = tokens(100, seed=3), scattered(25, seed=3)
    expected = reference_logits(model, sequence)
    spread = expected.std()
    for stored, largest, root_mean_square in ((torch.float32, 1e-5, 1e-6), (torch.int8, 0.15, 0.03)):
        with open_pages(folder, stored) as engine:
            engine.step(slice_of(sequence[:80], 0, table, samples=0))
            found = [engine.step(slice_of(sequence[at : at + 1], at, table)) for at in range(80, 100)]
        error = (torch.cat(found) - expected[80:]) / spread
        assert error.abs().max() < largest, stored
        assert error.square().mean().sqrt() < root_mean_square, stored


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_it_does_not_matter_how_a_prompt_is_cut(llama: tuple[Path, Any], stored: torch.dtype) -> None:
    folder, _ = llama
    prompt = tokens(90, seed=4)
    found = []
    for cuts in ((90,), (64, 26), (7, 1, 1, 70, 11)):
        with open_pages(folder, stored) as engine:
            start, table = 0, scattered(23, seed=len(cuts))
            for count in cuts:
                logits = engine.step(slice_of(prompt[start : start + count], start, table))
                start += count
        found.append(logits)
    for logits in found[1:]:
        assert (logits - found[0]).abs().max() < TOLERANCE


def test_weights_in_bfloat16_may_have_an_eight_bit_pool(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    sequence, table = tokens(41, seed=5), scattered(11, seed=5)
    expected = reference_logits(model, sequence)[-1:].float()
    with open_pages(folder, torch.int8, dtype=torch.bfloat16) as engine:
        engine.step(slice_of(sequence[:40], 0, table, samples=0))
        found = engine.step(slice_of(sequence[40:], 40, table))
    assert torch.nn.functional.cosine_similarity(found, expected).item() > 0.98


def test_an_eight_bit_pool_is_27_percent_of_a_float32_one(tmp_path: Path) -> None:
    sizes = {"head_dim": 64}
    config = type(family_configs()["qwen3"])(**{**family_configs()["qwen3"].to_dict(), **sizes})
    random_model(config).save_pretrained(tmp_path)
    with open_pages(tmp_path) as exact, open_pages(tmp_path, torch.int8) as rounded:
        assert rounded.cache.block_bytes * 256 == exact.cache.block_bytes * 68
