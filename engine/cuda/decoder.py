"""Edge: the decoder as a GPU runs it: fused kernels between the matrix products, K and V go to the pool."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cuda.attention import PagedAttention
from engine.cuda.batch import DeviceBatch
from engine.cuda.kernels.activation import swiglu
from engine.cuda.kernels.norm import rms_norm
from engine.cuda.kernels.rope_write import HeadNorms, rope_write
from engine.model_config import ModelConfig
from engine.rope import inverse_frequencies


@dataclass(frozen=True, slots=True)
class _Product:
    """y = x W^T + b."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: _Product
    head_norms: HeadNorms | None
    output: _Product
    mlp_norm: Tensor
    gate_up: _Product
    down: _Product


class CudaDecoder:
    """Token ids in, logits out; the weights' device and type are those of the arithmetic."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], pool: Tensor) -> None:
        """`weights` as weights.expected_tensors names them; `pool` as KvCache lays it out."""
        self._config = config
        self._pool = pool
        self._embeddings = weights["model.embed_tokens.weight"]
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(self._embeddings.device)
        self._layers = tuple(_layer(config, weights, index) for index in range(config.layers))
        self._norm = weights["model.norm.weight"]
        self._head = self._embeddings if config.tied_embeddings else weights["lm_head.weight"]

    def forward(self, batch: DeviceBatch, attention: PagedAttention) -> Tensor:
        """Logits [logit_rows, vocabulary] in the weights' type; `attention` has planned the batch.

        Waits for nothing on the device, so that a graph can hold it. Must run under torch.inference_mode.
        """
        config = self._config
        hidden = F.embedding(batch.token_ids, self._embeddings)
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            projected = layer.qkv(self._normed(hidden, delta, layer.input_norm))
            queries = projected.new_empty((hidden.shape[0], config.heads, config.head_dim))
            rope_write(
                projected,
                batch.positions,
                self._frequencies,
                batch.slots,
                layer.head_norms,
                queries,
                self._pool,
                index,
            )
            attended = torch.empty_like(queries)
            attention.attend(index, queries, attended)
            delta = layer.output(attended.view(hidden.shape[0], -1))
            gate_up = layer.gate_up(self._normed(hidden, delta, layer.mlp_norm))
            inner = gate_up.new_empty((hidden.shape[0], config.intermediate_size))
            swiglu(gate_up, inner)
            delta = layer.down(inner)
        wanted = None if delta is None else delta[batch.logit_rows]
        if batch.logit_rows.shape[0] == 0:
            return hidden.new_empty((0, config.vocabulary_tokens))
        return F.linear(self._normed(hidden[batch.logit_rows], wanted, self._norm), self._head)

    def _normed(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """Adds `delta` to `hidden` in place and returns the sum's norm."""
        out = torch.empty_like(hidden)
        rms_norm(hidden, delta, weight, self._config.norm_eps, out)
        return out


def _layer(config: ModelConfig, weights: Mapping[str, Tensor], index: int) -> _Layer:
    prefix = f"model.layers.{index}."

    def product(*names: str) -> _Product:
        """One product for several projections of the same input."""
        parts = [weights[f"{prefix}{name}.weight"] for name in names]
        biases = [weights[key] for name in names if (key := f"{prefix}{name}.bias") in weights]
        return _Product(
            torch.cat(parts) if len(parts) > 1 else parts[0], torch.cat(biases) if biases else None
        )

    head_norms = None
    if config.qk_norm:
        queries, keys = (weights[f"{prefix}self_attn.{name}_norm.weight"] for name in ("q", "k"))
        head_norms = HeadNorms(queries, keys, config.norm_eps)
    return _Layer(
        input_norm=weights[prefix + "input_layernorm.weight"],
        qkv=product("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_norms=head_norms,
        output=product("self_attn.o_proj"),
        mlp_norm=weights[prefix + "post_attention_layernorm.weight"],
        gate_up=product("mlp.gate_proj", "mlp.up_proj"),
        down=product("mlp.down_proj"),
    )
