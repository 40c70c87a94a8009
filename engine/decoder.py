"""Edge: one decoder for all supported families; what differs between them is data in ModelConfig."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import BatchAttention
from engine.contract import LayerListener
from engine.linear import MakeProduct, Product
from engine.model_config import ModelConfig
from engine.rope import inverse_frequencies, rotate, rotation


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights; norms are [hidden] or, for q and k, [head_dim]."""

    input_norm: Tensor
    qkv: Product
    qk_norms: tuple[Tensor, Tensor] | None
    output: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


class Decoder:
    """Token ids in, logits out; K and V go through the attention given with each call."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], product: MakeProduct) -> None:
        """`weights` as weights.expected_tensors names them; `product` makes what multiplies by them."""
        self._config = config
        self._embeddings = weights["model.embed_tokens.weight"]
        self._dtype = self._embeddings.dtype
        self._epsilon = torch.tensor(config.norm_eps, device=self._embeddings.device)
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(self._embeddings.device)
        self._layers = tuple(_layer(config, weights, index, product) for index in range(config.layers))
        self._norm = weights["model.norm.weight"]
        head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
        self._head = product(weights[head], None)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: BatchAttention,
        logit_rows: Tensor,
        on_layers: LayerListener | None = None,
    ) -> Tensor:
        """Feeds a flat batch; returns float32 logits [logit_rows, vocabulary].

        `token_ids` and `positions` are int64 [tokens]; `logit_rows` int64 holds the batch rows whose next
        token is wanted. `on_layers` hears of each layer whose K and V were given to the attention. Must run
        under torch.inference_mode.
        """
        return self.logits(self.features(token_ids, positions, attention, logit_rows, on_layers))

    def features(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: BatchAttention,
        rows: Tensor,
        on_layers: LayerListener | None = None,
    ) -> Tensor:
        """Feeds a flat batch as `forward` does; returns the normed last hidden states [rows, hidden]."""
        hidden = self.embed(token_ids)  # [tokens, hidden]
        cosine, sine = rotation(positions, self._frequencies, self._dtype)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            attended = self._attend(index, layer, hidden, cosine, sine, attention)
            if on_layers is not None:
                on_layers(index + 1)
            if index == last:
                # Past the last K and V only the rows that become logits matter.
                hidden, attended = hidden[rows], attended[rows]
                if rows.shape[0] == 0:
                    break
            hidden.add_(layer.output(attended))
            hidden.add_(self._mlp(layer, hidden))
        return self._normed(hidden, self._norm)

    def logits(self, features: Tensor) -> Tensor:
        """Float32 logits [rows, vocabulary] of the token after each row of `features` [rows, hidden]."""
        if features.shape[0] == 0:
            return features.new_zeros((0, self._config.vocabulary_tokens), dtype=torch.float32)
        return self._head(features).float()

    def embed(self, token_ids: Tensor) -> Tensor:
        """The embeddings [tokens, hidden] of int64 [tokens]."""
        return F.embedding(token_ids, self._embeddings)

    def _attend(
        self,
        index: int,
        layer: _Layer,
        hidden: Tensor,
        cosine: Tensor,
        sine: Tensor,
        attention: BatchAttention,
    ) -> Tensor:
        """[tokens, hidden] to [tokens, heads * head_dim], before the output projection."""
        config = self._config
        projected = layer.qkv(self._normed(hidden, layer.input_norm))
        heads = projected.view(hidden.shape[0], -1, config.head_dim)  # [tokens, heads + 2 kv_heads, head_dim]
        turning = config.heads + config.kv_heads
        queries_keys, values = heads[:, :turning], heads[:, turning:]
        if layer.qk_norms is not None:
            query_norm, key_norm = layer.qk_norms
            queries = self._normed(queries_keys[:, : config.heads], query_norm)
            keys = self._normed(queries_keys[:, config.heads :], key_norm)
            queries_keys = torch.cat((queries, keys), dim=1)
        turned = rotate(queries_keys, cosine, sine)
        return attention(index, turned[:, : config.heads], turned[:, config.heads :], values)

    def _mlp(self, layer: _Layer, hidden: Tensor) -> Tensor:
        """SwiGLU: [tokens, hidden] to [tokens, hidden]."""
        gate, up = layer.gate_up(self._normed(hidden, layer.mlp_norm)).chunk(2, dim=-1)
        return layer.down(F.silu(gate).mul_(up))

    def _normed(self, rows: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last dimension; as F.rms_norm, in half as many passes."""
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, length, length, value=1 / weight.shape[0]).rsqrt_()
        return (rows * scale).to(rows.dtype).mul_(weight)


def _layer(config: ModelConfig, weights: Mapping[str, Tensor], index: int, product: MakeProduct) -> _Layer:
    prefix = f"model.layers.{index}."

    def linear(*names: str) -> Product:
        """One product for several projections of the same input."""
        parts = [weights[f"{prefix}{name}.weight"] for name in names]
        biases = [weights[key] for name in names if (key := f"{prefix}{name}.bias") in weights]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        return product(weight, torch.cat(biases) if biases else None)

    norms = tuple(weights[f"{prefix}self_attn.{name}_norm.weight"] for name in ("q", "k") if config.qk_norm)
    return _Layer(
        input_norm=weights[prefix + "input_layernorm.weight"],
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        qk_norms=(norms[0], norms[1]) if config.qk_norm else None,
        output=linear("self_attn.o_proj"),
        mlp_norm=weights[prefix + "post_attention_layernorm.weight"],
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )
