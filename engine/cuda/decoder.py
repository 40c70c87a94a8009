"""Edge: the decoder as a GPU runs it: fused kernels between the matrix products, K and V go to the pool."""

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.contract import LayerListener
from engine.cpu.rope import inverse_frequencies
from engine.cuda.attention import PagedAttention
from engine.cuda.batch import DeviceBatch
from engine.cuda.kernels.activation import swiglu
from engine.cuda.kernels.norm import rms_norm
from engine.cuda.kernels.rope_write import HeadNorms, rope_write
from engine.models.model_config import ModelConfig


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

    def __init__(self, config: ModelConfig, weights: MutableMapping[str, Tensor]) -> None:
        """Takes out of `weights`, named by weights.expected_tensors, so that joined ones are held once."""
        self._config = config
        self._embeddings = weights.pop("model.embed_tokens.weight")
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(self._embeddings.device)
        self._layers = tuple(_layer(config, weights, index) for index in range(config.layers))
        self._norm = weights.pop("model.norm.weight")
        self._head = self._embeddings if config.tied_embeddings else weights.pop("lm_head.weight")

    def features(
        self, batch: DeviceBatch, attention: PagedAttention, on_layers: LayerListener | None = None
    ) -> Tensor:
        """The normed last hidden states [logit_rows, hidden]; `attention` has planned the batch.

        K and V go to the attention's pool; `on_layers` hears of each layer whose kernels are queued. Waits
        for nothing on the device, so that a graph can hold it. Must run under torch.inference_mode.
        """
        rows = batch.logit_rows
        hidden = self.embed(batch.token_ids)
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            normed = self._normed(hidden, delta, layer.input_norm)
            queries = self._queries(index, normed, batch, attention.pool)
            if on_layers is not None:
                on_layers(index + 1)
            if index == len(self._layers) - 1 and rows.shape[0] == 0:
                return hidden[:0]
            attended = torch.empty_like(queries)
            attention.attend(index, queries, attended)
            attended = attended.view(hidden.shape[0], -1)
            if index == len(self._layers) - 1 and rows.shape[0] < hidden.shape[0]:
                # Past the last K and V only the rows that become logits matter.
                hidden, attended = hidden[rows], attended[rows]
            gate_up = layer.gate_up(self._normed(hidden, layer.output(attended), layer.mlp_norm))
            inner = gate_up.new_empty((hidden.shape[0], self._config.intermediate_size))
            swiglu(gate_up, inner)
            delta = layer.down(inner)
        return self._normed(hidden, delta, self._norm)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [rows, vocabulary] in the weights' type, of the token after each row of `features`."""
        return F.linear(features, self._head)

    def embed(self, token_ids: Tensor) -> Tensor:
        """The embeddings [tokens, hidden] of int64 [tokens]."""
        return F.embedding(token_ids, self._embeddings)

    def _queries(self, index: int, rows: Tensor, batch: DeviceBatch, pool: Tensor) -> Tensor:
        """Rotated queries [tokens, heads, head_dim] of normed rows; their K and V go to the pool."""
        layer, config = self._layers[index], self._config
        projected = layer.qkv(rows)
        queries = projected.new_empty((rows.shape[0], config.heads, config.head_dim))
        rope_write(
            projected,
            batch.positions,
            self._frequencies,
            batch.slots,
            layer.head_norms,
            queries,
            pool,
            index,
        )
        return queries

    def _normed(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """Adds `delta` to `hidden` in place and returns the sum's norm."""
        out = torch.empty_like(hidden)
        rms_norm(hidden, delta, weight, self._config.norm_eps, out)
        return out


def _layer(config: ModelConfig, weights: MutableMapping[str, Tensor], index: int) -> _Layer:
    prefix = f"model.layers.{index}."

    def product(*names: str) -> _Product:
        """One product for several projections of the same input."""
        parts = [weights.pop(f"{prefix}{name}.weight") for name in names]
        biases = [weights.pop(key) for name in names if (key := f"{prefix}{name}.bias") in weights]
        return _Product(
            torch.cat(parts) if len(parts) > 1 else parts[0], torch.cat(biases) if biases else None
        )

    head_norms = None
    if config.qk_norm:
        queries, keys = (weights.pop(f"{prefix}self_attn.{name}_norm.weight") for name in ("q", "k"))
        head_norms = HeadNorms(queries, keys, config.norm_eps)
    return _Layer(
        input_norm=weights.pop(prefix + "input_layernorm.weight"),
        qkv=product("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_norms=head_norms,
        output=product("self_attn.o_proj"),
        mlp_norm=weights.pop(prefix + "post_attention_layernorm.weight"),
        gate_up=product("mlp.gate_proj", "mlp.up_proj"),
        down=product("mlp.down_proj"),
    )
