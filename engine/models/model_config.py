"""Pure: what a decoder is made of, read from a Hugging Face folder's config.json."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from tandem.errors import ModelError

_MAX_JSON_BYTES = 64 * 1024 * 1024


class RopeKind(Enum):
    """How rotary frequencies are stretched for contexts longer than the pretraining's."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding; the last four fields have a meaning for LLAMA3 only, `factor` also for LINEAR."""

    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's shape. `windows` holds each layer's sliding window in tokens, None for full attention."""

    architecture: str
    vocabulary_tokens: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    context_tokens: int
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    eos_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's name implies, and the defaults of keys that its config.json may leave out."""

    windows: Callable[["_Reader", int], tuple[int | None, ...]]
    qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None


class _Reader:
    """Typed access to a config.json that names the file and key in every error."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    def fail(self, key: str, problem: str) -> ModelError:
        """The error to raise for a key."""
        return ModelError(f"{self.path}: {key} {problem}.")

    def number(self, key: str, default: float | None = None) -> float:
        """A number; the default stands for an absent key."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"must be a number, found {value!r}")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; the default stands for an absent or null key."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(key, f"must be a positive whole number, found {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false; the default stands for an absent key."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, found {value!r}")
        return value


def _full_attention(_reader: _Reader, layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


def _mistral_windows(reader: _Reader, layers: int) -> tuple[int | None, ...]:
    if "sliding_window" in reader.values and reader.values["sliding_window"] is None:
        return (None,) * layers
    return (reader.count("sliding_window", 4096),) * layers


def _qwen_windows(reader: _Reader, layers: int) -> tuple[int | None, ...]:
    if not reader.flag("use_sliding_window", False) or reader.values.get("sliding_window", 4096) is None:
        return (None,) * layers
    window = reader.count("sliding_window", 4096)
    first = int(reader.number("max_window_layers", 28))
    default = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    kinds = reader.values.get("layer_types") or default
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise reader.fail("layer_types", "must name sliding_attention or full_attention for every layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(_full_attention, reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": _Family(_mistral_windows),
    "Qwen2ForCausalLM": _Family(_qwen_windows, qkv_bias=True),
    "Qwen3ForCausalLM": _Family(_qwen_windows, reads_attention_bias=True, qk_norm=True, head_dim=128),
}
"""Supported architectures."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a model's file; raises ModelError that names it."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path} is larger than {_MAX_JSON_BYTES} bytes.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return values


def read_model_config(folder: Path) -> ModelConfig:
    """The decoder that a folder describes; raises ModelError naming what is missing or unsupported."""
    path = folder / "config.json"
    reader = _Reader(read_json(path), path)
    architecture, family = _family(reader)
    activation = reader.values.get("hidden_act", "silu")
    if activation != "silu":
        raise reader.fail("hidden_act", f"{activation!r} is not supported; supported: 'silu'")
    layers, heads = reader.count("num_hidden_layers"), reader.count("num_attention_heads")
    hidden, kv_heads = reader.count("hidden_size"), reader.count("num_key_value_heads", heads)
    head_dim = reader.count("head_dim", family.head_dim or hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise reader.fail("num_key_value_heads", f"{kv_heads} must divide {heads} heads of an even head_dim")
    attention_bias = family.reads_attention_bias and reader.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        vocabulary_tokens=reader.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.count("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=_rope(reader),
        context_tokens=reader.count("max_position_embeddings"),
        tied_embeddings=reader.flag("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and reader.flag("mlp_bias", False),
        qk_norm=family.qk_norm,
        windows=family.windows(reader, layers),
        eos_ids=read_eos_ids(folder),
    )


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end an output, from generation_config.json or else config.json; empty if neither says."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.exists():
            continue
        value = read_json(path).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise ModelError(f"{path}: eos_token_id must be a token id or a list of them, found {value!r}.")
        return tuple(ids)
    return ()


def _family(reader: _Reader) -> tuple[str, _Family]:
    named = reader.values.get("architectures") or []
    for architecture in named:
        if architecture in FAMILIES:
            return architecture, FAMILIES[architecture]
    found = ", ".join(map(str, named)) or "none"
    raise reader.fail("architectures", f"names {found}; supported: {', '.join(FAMILIES)}")


def _rope(reader: _Reader) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (before it)."""
    scaling = dict(reader.values.get("rope_parameters") or reader.values.get("rope_scaling") or {})
    name = scaling.get("rope_type", scaling.get("type", "default"))
    supported = [kind.value for kind in RopeKind]
    if name not in supported:
        raise reader.fail("rope_parameters", f"rope_type {name!r} is not supported; supported: {supported}")
    partial = scaling.get("partial_rotary_factor", reader.values.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise reader.fail("partial_rotary_factor", f"{partial!r} is not supported; supported: 1.0")
    theta = scaling.get("rope_theta", reader.values.get("rope_theta", 10000.0))
    parameters = _Reader({**scaling, "rope_theta": theta}, reader.path)
    kind = RopeKind(name)
    if kind is RopeKind.DEFAULT:
        return RopeConfig(theta=parameters.number("rope_theta"))
    if kind is RopeKind.LINEAR:
        return RopeConfig(parameters.number("rope_theta"), kind, parameters.number("factor"))
    return RopeConfig(
        theta=parameters.number("rope_theta"),
        kind=kind,
        factor=parameters.number("factor"),
        low_freq_factor=parameters.number("low_freq_factor"),
        high_freq_factor=parameters.number("high_freq_factor"),
        original_context_tokens=parameters.count(
            "original_max_position_embeddings", reader.count("max_position_embeddings")
        ),
    )
