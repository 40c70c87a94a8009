"""Edge: one decoder for all supported families; what differs between them is data in ModelConfig."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import BatchAttention
from engine.contract import LayerListener
from engine.cpu.attention import CpuBatchAttention
from engine.cpu.linear import MakeProduct, Product
from engine.cpu.rope import inverse_frequencies, rotation
from engine.cpu.row_passes import RowPasses, TorchRows
from engine.models.model_config import ModelConfig

if TYPE_CHECKING:
    from engine.native.layers import NativeLayers
    from engine.native.team import Team


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

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        product: MakeProduct,
        team: "Team | None" = None,
    ) -> None:
        """`weights` as weights.expected_tensors names them; `product` makes what multiplies by them.

        With a `team`, which takes float32 or bfloat16 on the CPU, native loops do what they can.
        """
        if team is not None:
            product = _with_few_rows(product, team)
        self._config = config
        self._embeddings = weights["model.embed_tokens.weight"]
        self._dtype = self._embeddings.dtype
        # The passes that stand alone are float32's; in bfloat16 long spans leave them to torch.
        self._rows = _row_passes(
            config, self._embeddings.device, team if self._dtype == torch.float32 else None
        )
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(self._embeddings.device)
        self._layers = tuple(_layer(config, weights, index, product) for index in range(config.layers))
        following = [layer.input_norm for layer in self._layers[1:]]
        self._norms_after = (*following, weights["model.norm.weight"])
        self._native = None if team is None else self._native_layers(team)
        head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
        self._head = _to_float32(product(weights[head], None), team)

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
        native = attention.native if isinstance(attention, CpuBatchAttention) else None
        if native is not None and self._native is not None and self._native.takes(token_ids.shape[0]):
            fed = token_ids, positions
            return self._native.features(*fed, native.attention, native.spans, on_layers)[rows]
        hidden = self.embed(token_ids)  # [tokens, hidden]
        cosine, sine = rotation(positions, self._frequencies, self._dtype)
        passes = self._rows
        normed = passes.normed(hidden, self._layers[0].input_norm)
        for index, layer in enumerate(self._layers):
            attended = self._attend(index, layer, normed, cosine, sine, attention)
            if on_layers is not None:
                on_layers(index + 1)
            if index == len(self._layers) - 1:
                # Past the last K and V only the rows that become logits matter.
                hidden, attended = hidden[rows], attended[rows]
                if rows.shape[0] == 0:
                    return hidden
            normed = passes.added(hidden, layer.output(attended), layer.mlp_norm)
            updates = layer.down(passes.gated(layer.gate_up(normed)))
            normed = passes.added(hidden, updates, self._norms_after[index])
        return normed

    def logits(self, features: Tensor) -> Tensor:
        """Float32 logits [rows, vocabulary] of the token after each row of `features` [rows, hidden]."""
        if features.shape[0] == 0:
            return features.new_zeros((0, self._config.vocabulary_tokens), dtype=torch.float32)
        return self._head(features)

    def embed(self, token_ids: Tensor) -> Tensor:
        """The embeddings [tokens, hidden] of int64 [tokens]."""
        return F.embedding(token_ids, self._embeddings)

    def _native_layers(self, team: "Team") -> "NativeLayers | None":
        """None where a product or a norm of a head is left to torch."""
        from engine.native.layers import LayerWeights, ModelWeights, NativeLayers
        from engine.native.product import few_rows_of

        layers = []
        for layer, norm_after in zip(self._layers, self._norms_after, strict=True):
            qkv, output, gate_up, down = (
                few_rows_of(product) for product in (layer.qkv, layer.output, layer.gate_up, layer.down)
            )
            if qkv is None or output is None or gate_up is None or down is None or layer.qk_norms is not None:
                return None
            norms = layer.mlp_norm.float(), norm_after.float()
            layers.append(LayerWeights(qkv, output, norms[0], gate_up, down, norms[1]))
        first_norm = self._layers[0].input_norm.float()
        weights = ModelWeights(self._embeddings, self._frequencies, first_norm, tuple(layers))
        return NativeLayers(team, self._config, weights)

    def _attend(
        self,
        index: int,
        layer: _Layer,
        normed: Tensor,
        cosine: Tensor,
        sine: Tensor,
        attention: BatchAttention,
    ) -> Tensor:
        """[tokens, hidden] to [tokens, heads * head_dim], before the output projection."""
        config = self._config
        heads = layer.qkv(normed).view(normed.shape[0], -1, config.head_dim)
        turning = config.heads + config.kv_heads  # of [tokens, heads + 2 kv_heads, head_dim]
        values = heads[:, turning:]
        if layer.qk_norms is not None:
            query_norm, key_norm = layer.qk_norms
            queries = self._rows.normed(heads[:, : config.heads], query_norm)
            keys = self._rows.normed(heads[:, config.heads : turning], key_norm)
            heads = torch.cat((queries, keys), dim=1)
        turned = self._rows.turned(heads, turning, cosine, sine)
        return attention(index, turned[:, : config.heads], turned[:, config.heads :], values)


def _row_passes(config: ModelConfig, device: torch.device, team: "Team | None") -> RowPasses:
    if team is None:
        return TorchRows(config.norm_eps, device)
    from engine.native.row_passes import NativeRows

    return NativeRows(team, config.norm_eps)


def _with_few_rows(product: MakeProduct, team: "Team") -> MakeProduct:
    from engine.native.product import with_few_rows

    return with_few_rows(product, team)


def _to_float32(product: Product, team: "Team | None") -> Product:
    """A native product sums in float32: rounding its sums to the weight's type would only lose digits."""
    if team is not None:
        from engine.native.product import FewRowsLinear

        if isinstance(product, FewRowsLinear):
            return product.wide
    return lambda rows: product(rows).float()


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
