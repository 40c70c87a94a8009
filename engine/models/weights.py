"""Edge: a decoder's weights out of safetensors files, mapped into memory rather than read."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.models.model_config import ModelConfig, read_json
from engine.progress import Progress
from tandem.errors import ModelError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DERIVED = ("rotary_emb.inv_freq", "attn.masked_bias")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the decoder needs."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocabulary_tokens, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocabulary_tokens, hidden)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _layer_tensors(config).items()}
    return shapes


def _layer_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    projections = {
        "self_attn.q_proj": (query, hidden, config.qkv_bias),
        "self_attn.k_proj": (key, hidden, config.qkv_bias),
        "self_attn.v_proj": (key, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, query, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (config.head_dim,) for name in ("q", "k")}
    for name, (rows, columns, bias) in projections.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def linear_shapes(config: ModelConfig) -> Counter[tuple[int, int]]:
    """(out, in) of every matrix product of the decoder, and how many weights have it.

    As the decoder fuses them: query, key and value are one product, gate and up another.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = ((query + 2 * key, hidden), (hidden, query), (2 * inner, hidden), (hidden, inner))
    shapes: Counter[tuple[int, int]] = Counter()
    for shape in layer:
        shapes[shape] += config.layers
    shapes[config.vocabulary_tokens, hidden] += 1
    return shapes


def unmapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies what is used as stored, so that nothing holds the mapped file once the rest is laid out anew."""
    kept = ("norm.weight", "embed_tokens.weight", ".bias")
    return {name: tensor.clone() if name.endswith(kept) else tensor for name, tensor in weights.items()}


def weight_files(folder: Path) -> dict[Path, tuple[str, ...] | None]:
    """A folder's safetensors files, with the tensors that the index says are in each (None: no index)."""
    if (folder / _INDEX).exists():
        placed = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise ModelError(f"{folder / _INDEX} has no weight_map.")
        files: dict[Path, tuple[str, ...] | None] = {}
        for name in sorted(set(placed.values())):
            if not isinstance(name, str) or Path(name).name != name:
                raise ModelError(f"{folder / _INDEX} names a file outside its folder: {name!r}.")
            files[folder / name] = tuple(tensor for tensor, file in placed.items() if file == name)
        return files
    if (folder / _SINGLE).exists():
        return {folder / _SINGLE: None}
    raise ModelError(f"{folder} has neither {_SINGLE} nor {_INDEX}.")


def read_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """All tensors of `expected_tensors`, in `dtype` on `device`.

    On the CPU a tensor stored in `dtype` stays mapped to its file: processes share its pages. Raises
    ModelError naming the tensor that is missing, unexpected or of another shape.
    """
    expected = expected_tensors(config)
    total = sum(_elements(shape) for shape in expected.values()) * dtype.itemsize
    done = 0
    weights: dict[str, Tensor] = {}
    for path, promised in weight_files(folder).items():
        for name, tensor in _file_tensors(path, promised, expected, config):
            weights[name] = tensor.to(device=device, dtype=dtype)
            done += tensor.numel() * dtype.itemsize
            if progress is not None:
                progress(done, total)
    missing = [name for name in expected if name not in weights]
    if missing:
        raise ModelError(f"{folder} lacks the tensor {missing[0]} ({len(missing)} missing in all).")
    return weights


def _file_tensors(
    path: Path,
    promised: tuple[str, ...] | None,
    expected: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
) -> list[tuple[str, Tensor]]:
    """The file's tensors that the decoder needs, each checked."""
    tensors = []
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names = set(file.keys())
            for name in promised or ():
                if name not in names:
                    raise ModelError(f"{path} lacks the tensor {name}, which {_INDEX} places there.")
            for name in sorted(names):
                if _superfluous(name, config):
                    continue
                if name not in expected:
                    raise ModelError(f"{path} holds {name}, which {config.architecture} does not have.")
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise ModelError(f"{path}: {name} holds {tensor.dtype}, which is not a float type.")
                if tuple(tensor.shape) != expected[name]:
                    found = list(tensor.shape)
                    raise ModelError(f"{path}: {name} has shape {found}, expected {list(expected[name])}.")
                tensors.append((name, tensor))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}.") from error
    return tensors


def _superfluous(name: str, config: ModelConfig) -> bool:
    """Tensors that checkpoints carry although they follow from others."""
    return name.endswith(_DERIVED) or (name == "lm_head.weight" and config.tied_embeddings)


def _elements(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
