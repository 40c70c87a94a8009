"""Edge: tiny models, draft models and heads in folders, for tests of drafters."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tandem.ids import Incarnation, WorkerId
from tandem.worker import Role
from tandem.worker_config import SpeculativeConfig, WorkerConfig
from tests.engine.tiny_models import SIZES, family_configs, random_model

BLOCKS, SIZE = 96, 4
HIDDEN, INNER, VOCABULARY = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]


def save_model(folder: Path, family: str = "llama", seed: int = 0, ids: range = range(VOCABULARY)) -> Path:
    """A random model with a tokenizer in which token i is written "t{ids[i]}"."""
    folder.mkdir(parents=True, exist_ok=True)
    random_model(family_configs()[family], seed).save_pretrained(folder)
    tokenizer = {
        "model": {"type": "BPE", "vocab": {f"t{name}": at for at, name in enumerate(ids)}, "merges": []}
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def save_near_copy(folder: Path, noise: float) -> Path:
    """The model of `save_model` with noise on its weights: a draft model that is often right."""
    save_model(folder)
    model: Any = random_model(family_configs()["llama"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def save_medusa(folder: Path, heads: int = 3, layers: int = 1) -> Path:
    """Small random heads, named as FasterDecoding/Medusa does."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for head in range(heads):
        for layer in range(layers):
            tensors[f"{head}.{layer}.linear.weight"] = torch.randn(HIDDEN, HIDDEN, generator=generator)
            tensors[f"{head}.{layer}.linear.bias"] = torch.randn(HIDDEN, generator=generator)
        tensors[f"{head}.{layers}.weight"] = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": heads, "medusa_num_layers": layers}))
    return folder


def save_eagle(folder: Path) -> Path:
    """A small random head for the model of `save_model`, named as EAGLE's checkpoints are."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(3)
    heads, kv_heads = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    head_dim = HIDDEN // heads
    shapes = {
        "fc.weight": (HIDDEN, 2 * HIDDEN),
        "layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "layers.0.self_attn.k_proj.weight": (kv_heads * head_dim, HIDDEN),
        "layers.0.self_attn.v_proj.weight": (kv_heads * head_dim, HIDDEN),
        "layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
        "layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
        "layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
        "layers.0.post_attention_layernorm.weight": (HIDDEN,),
    }
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def worker(folder: Path, speculative: SpeculativeConfig | None = None) -> WorkerConfig:
    """A decode worker's settings on one thread."""
    return WorkerConfig(
        WorkerId("w"),
        Incarnation(1),
        Role.DECODE,
        folder,
        "tiny",
        pool_blocks=BLOCKS,
        block_size=SIZE,
        token_budget=12,
        speculative=speculative,
    )
