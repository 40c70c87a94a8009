"""Every family's logits equal transformers', however the tokens are cut into steps and blocks scattered."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.cpu.attention import group_by_length
from engine.cpu.linear import stored_linear
from engine.models.model_config import ModelConfig, RopeKind, read_model_config
from engine.models.weights import read_weights
from tandem.errors import ModelError
from tests.engine.tiny_models import (
    family_configs,
    open_engine,
    random_model,
    reference_logits,
    slice_of,
)

TOLERANCE = 1e-4
PROMPT_TOKENS = 37


@pytest.fixture(scope="module", params=sorted(family_configs()))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A family's tiny model on disk, and transformers' own object."""
    model = random_model(family_configs()[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


def tokens(count: int, seed: int) -> list[int]:
    return [random.Random(seed + place).randrange(101) for place in range(count)]


def scattered(blocks: int, seed: int, pool: Sequence[int] = range(64)) -> list[int]:
    return random.Random(seed).sample(list(pool), blocks)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() < TOLERANCE


def test_whole_prompt(saved: tuple[Path, Any]) -> None:
    folder, model = saved
    prompt = tokens(PROMPT_TOKENS, seed=1)
    with open_engine(folder) as engine:
        found = engine.step(slice_of(prompt, 0, scattered(10, seed=1)))
    expected = reference_logits(model, prompt)
    assert expected.abs().max() > 1.0
    assert_close(found, expected[-1:])


@pytest.mark.parametrize("cuts", [(5, 16, 1, 15), (36, 1), (4, 4, 29), (1,) * 37])
def test_prompt_in_chunks_then_decode(saved: tuple[Path, Any], cuts: tuple[int, ...]) -> None:
    folder, model = saved
    sequence = tokens(PROMPT_TOKENS + 9, seed=2)
    expected = reference_logits(model, sequence)
    table = scattered(12, seed=2)
    with open_engine(folder) as engine:
        start = 0
        for cut in cuts + (1,) * 9:
            found = engine.step(slice_of(sequence[start : start + cut], start, table))
            start += cut
            assert_close(found, expected[start - 1 : start])


def test_mixed_batch_of_prompts_chunks_and_decodes(saved: tuple[Path, Any]) -> None:
    folder, model = saved
    lengths = (3, 8, 22, 37, 45)
    sequences = [tokens(length + 5, seed=10 + length) for length in lengths]
    blocks = scattered(64, seed=3)
    tables = [blocks[first : first + 13] for first in (0, 13, 26, 39, 51)]
    with open_engine(folder) as engine:
        for sequence, length, table in list(zip(sequences, lengths, tables, strict=True))[:3]:
            engine.step(slice_of(sequence[:length], 0, table, samples=0))
        engine.step(slice_of(sequences[3][:20], 0, tables[3], samples=0))
        found = engine.step(
            slice_of(sequences[2][22:23], 22, tables[2]),
            slice_of(sequences[3][20:37], 20, tables[3]),
            slice_of(sequences[0][3:4], 3, tables[0]),
            slice_of(sequences[4][:45], 0, tables[4]),
            slice_of(sequences[1][8:10], 8, tables[1], samples=0),
        )
    ends = ((2, 23), (3, 37), (0, 4), (4, 45))
    expected = torch.stack([reference_logits(model, sequences[which][:end])[-1] for which, end in ends])
    assert_close(found, expected)


def test_decode_batch_of_very_different_lengths(saved: tuple[Path, Any]) -> None:
    """Lengths that differ by more than the padding allowed, so that several groups are attended."""
    folder, model = saved
    lengths = [1, 2, 9, 30, 150, 151]
    sequences = [tokens(length + 1, seed=20 + length) for length in lengths]
    blocks = scattered(110, seed=4, pool=range(120))
    tables = []
    for length in lengths:
        count = length // 4 + 1
        tables.append(blocks[:count])
        blocks = blocks[count:]
    with open_engine(folder, num_blocks=120) as engine:
        for sequence, length, table in zip(sequences, lengths, tables, strict=True):
            engine.step(slice_of(sequence[:length], 0, table, samples=0))
        found = engine.step(
            *(
                slice_of(sequence[length:], length, table)
                for sequence, length, table in zip(sequences, lengths, tables, strict=True)
            )
        )
    expected = torch.stack([reference_logits(model, sequence)[-1] for sequence in sequences])
    assert_close(found, expected)


def test_torch_operators_give_the_same_logits_as_native_loops(saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    found = []
    for native in (True, False):
        with open_engine(folder, native=native) as engine:
            long, short = tokens(30, seed=3), tokens(9, seed=4)
            tables = (list(range(8)), list(range(20, 23)))
            steps = [engine.step(slice_of(long, 0, tables[0]), slice_of(short[:2], 0, tables[1]))]
            steps += [engine.step(slice_of(long[:1], 30, tables[0]), slice_of(short[2:], 2, tables[1]))]
            found.append(torch.cat(steps))
    assert_close(found[0], found[1])


def test_stored_weights_give_the_same_logits_as_reordered_ones(saved: tuple[Path, Any]) -> None:
    folder, model = saved
    prompt = tokens(PROMPT_TOKENS, seed=5)
    with open_engine(folder, product=stored_linear) as engine:
        found = engine.step(slice_of(prompt, 0, scattered(10, seed=5)))
    assert_close(found, reference_logits(model, prompt)[-1:])


def test_bfloat16_is_near_float32(saved: tuple[Path, Any]) -> None:
    folder, model = saved
    prompt = tokens(PROMPT_TOKENS, seed=6)
    table = scattered(10, seed=6)
    with open_engine(folder, dtype=torch.bfloat16) as engine:
        engine.step(slice_of(prompt[:-1], 0, table))
        found = engine.step(slice_of(prompt[-1:], 36, table))
    expected = reference_logits(model, prompt)[-1:]
    assert found.dtype == torch.float32
    similarity = torch.nn.functional.cosine_similarity(found, expected).item()
    assert 0.98 < similarity <= 1.001


def test_sharded_folder_loads_like_a_single_file(tmp_path: Path) -> None:
    model = random_model(family_configs()["llama"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    prompt = tokens(PROMPT_TOKENS, seed=7)
    with open_engine(tmp_path) as engine:
        found = engine.step(slice_of(prompt, 0, scattered(10, seed=7)))
    assert_close(found, reference_logits(model, prompt)[-1:])


def test_float16_checkpoint_is_converted(tmp_path: Path) -> None:
    random_model(family_configs()["llama"]).half().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = tokens(PROMPT_TOKENS, seed=8)
    with open_engine(tmp_path) as engine:
        found = engine.step(slice_of(prompt, 0, scattered(10, seed=8)))
    assert_close(found, reference_logits(model, prompt)[-1:])


def test_weights_of_the_wanted_dtype_stay_mapped(tmp_path: Path) -> None:
    """Two workers of a machine share the pages of a converted model."""
    random_model(family_configs()["llama"]).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    weights = read_weights(tmp_path, config, torch.float32, torch.device("cpu"))
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "model.safetensors") in maps
    assert len(weights) > 10


def rewritten(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    kept = load_file(path) | {name: tensor for name, tensor in change.items() if tensor is not None}
    save_file({name: tensor for name, tensor in kept.items() if change.get(name, tensor) is not None}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"lacks the tensor model\.norm\.weight"),
        ({"model.layers.9.mlp.up_proj.weight": torch.ones(2)}, r"holds model\.layers\.9\.mlp"),
        ({"model.norm.weight": torch.ones(5)}, r"model\.norm\.weight has shape \[5\], expected \[32\]"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int32)}, r"model\.norm\.weight holds torch\.int32"),
    ],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    random_model(family_configs()["llama"]).save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    config = read_model_config(tmp_path)
    with pytest.raises(ModelError, match=message):
        read_weights(tmp_path, config, torch.float32, torch.device("cpu"))


def test_a_truncated_weight_file_is_refused(tmp_path: Path) -> None:
    random_model(family_configs()["llama"]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        read_weights(tmp_path, read_model_config(tmp_path), torch.float32, torch.device("cpu"))


def test_an_index_may_not_name_files_outside_its_folder(tmp_path: Path) -> None:
    random_model(family_configs()["llama"]).save_pretrained(tmp_path)
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside its folder"):
        read_weights(tmp_path, read_model_config(tmp_path), torch.float32, torch.device("cpu"))


OLD_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float16",
    "eos_token_id": [7, 8],
}


def config_of(folder: Path, **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(OLD_LLAMA | changes))
    return read_model_config(folder)


def test_old_spelling_of_rope_scaling_is_read(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 4.0}
    config = config_of(tmp_path, rope_theta=500.0, rope_scaling=scaling)
    assert (config.rope.kind, config.rope.theta, config.rope.factor) == (RopeKind.LINEAR, 500.0, 4.0)
    assert config.kv_heads == 4
    assert config.eos_ids == (7, 8)


def test_generation_config_says_what_ends_an_output(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert config_of(tmp_path).eos_ids == (5,)


def test_mistral_without_the_key_has_its_default_window(tmp_path: Path) -> None:
    mistral = ["MistralForCausalLM"]
    assert config_of(tmp_path, architectures=mistral).windows == (4096, 4096)
    assert config_of(tmp_path, architectures=mistral, sliding_window=None).windows == (None, None)


def test_layer_types_choose_the_windows_of_qwen(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        architectures=["Qwen2ForCausalLM"],
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    assert config.windows == (16, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"names GPT2LMHeadModel; supported: LlamaForCausalLM"),
        ({"architectures": None}, r"names none; supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"'yarn' is not supported; supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"factor must be a number"),
        ({"hidden_act": "gelu"}, r"'gelu' is not supported; supported: 'silu'"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be a positive whole number, found 0"),
        ({"hidden_size": "32"}, r"hidden_size must be a positive whole number, found '32'"),
        ({"num_key_value_heads": 3}, r"3 must divide 4 heads"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5 is not supported"),
        ({"eos_token_id": "end"}, r"eos_token_id must be a token id or a list of them"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings must be true or false"),
    ],
)
def test_an_unsupported_configuration_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config_of(tmp_path, **changes)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_model_config(tmp_path)


def test_grouping_keeps_padding_bounded_and_every_index_once() -> None:
    lengths = [random.Random(place).choice((1, 2, 3, 60, 64, 500)) for place in range(50)]
    groups = group_by_length(lengths)
    assert sorted(index for group in groups for index in group) == list(range(50))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert sum(longest - lengths[index] for index in group) <= 64
