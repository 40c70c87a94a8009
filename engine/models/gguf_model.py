"""Edge: what a GGUF file's metadata and tensor names mean in the terms of a Hugging Face folder."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.models.gguf_file import GgufFile
from tandem.errors import ModelError

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_ROPE_FACTORS = "rope_freqs.weight"

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One tensor to write: its Hugging Face name, its GGUF name, and the order of its rows (None: as is)."""

    name: str
    source: str
    shape: tuple[int, ...]
    row_order: npt.NDArray[np.int64] | None


def folder_config(file: GgufFile) -> dict[str, Any]:
    """The config.json of the model; raises ModelError naming what is unsupported."""
    kind = file.architecture
    if kind not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ModelError(f"{file.path}: architecture {kind!r} is not supported; supported: {supported}.")
    if file.whole(f"{kind}.expert_count", 0):
        raise ModelError(f"{file.path}: mixture-of-experts models are not supported.")
    shapes = file.shapes
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{file.path} lacks the tensor token_embd.weight.")
    heads, hidden = file.whole(f"{kind}.attention.head_count"), file.whole(f"{kind}.embedding_length")
    head_dim = file.whole(f"{kind}.attention.key_length", hidden // max(heads, 1))
    if file.whole(f"{kind}.rope.dimension_count", head_dim) != head_dim:
        raise ModelError(f"{file.path}: rotary embedding of a part of each head is not supported.")
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": file.whole(f"{kind}.feed_forward_length"),
        "num_hidden_layers": file.whole(f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.whole(f"{kind}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": file.number(f"{kind}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": file.whole(f"{kind}.context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "dtype": "float32",
        "rope_parameters": _rope_parameters(file, kind, head_dim),
        **_family_keys(file, kind),
        **_token_ids(file),
    }


def _family_keys(file: GgufFile, kind: str) -> dict[str, Any]:
    """What only some families' config.json has; a Mistral file calls itself llama and has a window."""
    window = file.whole(f"{kind}.attention.sliding_window", 0)
    if kind == "llama" and window:
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    if window:
        raise ModelError(f"{file.path}: a sliding window in architecture {kind!r} is not supported.")
    if kind == "llama":
        biased = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
        return {key: tensor in file.shapes for key, tensor in biased.items()}
    return {}


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The generation_config.json: which tokens begin and end an output."""
    return _token_ids(file)


def tensor_sources(file: GgufFile, config: Mapping[str, Any]) -> list[TensorSource]:
    """Every tensor of the folder, in the file's order; raises ModelError naming one that has no place."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    sources = []
    for source, shape in file.shapes.items():
        if source == _ROPE_FACTORS:
            continue
        if source in _TOP_NAMES:
            sources.append(TensorSource(_TOP_NAMES[source], source, shape, None))
            continue
        match = _LAYER_TENSOR.fullmatch(source)
        if match is None or match[2] not in _LAYER_NAMES:
            raise ModelError(
                f"{file.path}: the tensor {source} has no place in {config['architectures'][0]}."
            )
        name = f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
        permuted = file.architecture == "llama" and match[2] in heads
        order = rotary_row_order(shape[0], heads[match[2]]) if permuted else None
        sources.append(TensorSource(name, source, shape, order))
    return sources


def rotary_row_order(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """For each row in Hugging Face's order, its row in llama.cpp's.

    llama.cpp rotates neighbouring rows of a head in pairs and so stores llama's q and k interleaved; Hugging
    Face pairs the first half of a head with the second.
    """
    if rows % (2 * heads):
        raise ModelError(f"{rows} rows do not divide into {heads} heads of an even size.")
    return np.arange(rows, dtype=np.int64).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _token_ids(file: GgufFile) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    begin = file.whole("tokenizer.ggml.bos_token_id", -1)
    ends = [file.whole(f"tokenizer.ggml.{name}_token_id", -1) for name in ("eos", "eot")]
    present = list(dict.fromkeys(end for end in ends if end >= 0))
    if begin >= 0:
        ids["bos_token_id"] = begin
    if present:
        ids["eos_token_id"] = present if len(present) > 1 else present[0]
    return ids


def _rope_parameters(file: GgufFile, kind: str, head_dim: int) -> dict[str, Any]:
    theta = file.number(f"{kind}.rope.freq_base", 10000.0)
    scaling = file.text(f"{kind}.rope.scaling.type", "none")
    if _ROPE_FACTORS in file.shapes:
        factors = np.concatenate([part.reshape(-1) for part in file.rows(_ROPE_FACTORS)])
        return _llama3_parameters(file, factors, theta, head_dim)
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear":
        factor = file.number(f"{kind}.rope.scaling.factor")
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    raise ModelError(
        f"{file.path}: rope scaling {scaling!r} is not supported; supported: none, linear, llama3."
    )


def _llama3_parameters(
    file: GgufFile, factors: npt.NDArray[np.float32], theta: float, head_dim: int
) -> dict[str, Any]:
    """Llama 3's scaling, of which a GGUF keeps only the resulting factor of each frequency.

    All published Llama 3.x models differ in `factor` alone, which is the largest of the factors; whether the
    rest is as published is checked.
    """
    parameters: dict[str, Any] = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = [llama3_factor(theta ** (2 * pair / head_dim), parameters) for pair in range(head_dim // 2)]
    if len(factors) != len(expected) or not np.allclose(factors, expected, rtol=1e-3):
        raise ModelError(f"{file.path}: {_ROPE_FACTORS} holds factors that are not Llama 3's; not supported.")
    return parameters


def llama3_factor(inverse_frequency: float, parameters: Mapping[str, Any]) -> float:
    """How much slower Llama 3's scaling turns a pair of dimensions."""
    turns = parameters["original_max_position_embeddings"] / (2 * math.pi * inverse_frequency)
    low, high, factor = parameters["low_freq_factor"], parameters["high_freq_factor"], parameters["factor"]
    if turns > high:
        return 1.0
    if turns < low:
        return float(factor)
    share = (turns - low) / (high - low)
    return float(1.0 / ((1 - share) / factor + share))
