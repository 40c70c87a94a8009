"""Edge: an EAGLE head (Li et al. 2024): one layer that guesses the model's next hidden state, then the token.

The head reads pairs of a hidden state and the token drawn from it. It starts with what the decode worker
draws: hidden states of the prompt stay at the prefill worker, so its first guesses know only the output.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import AttentionBackend, BatchAttention, Span
from engine.cpu.linear import Linear, packed_linear
from engine.cpu.rope import inverse_frequencies, rotate, rotation
from engine.drafting.draft import Proposal
from engine.drafting.guess_tree import Candidates, best_tree
from engine.drafting.head_weights import read_tensors
from engine.drafting.held_kv import HeldKv, HeldSequence
from engine.drafting.runner_drafter import GrownSequence
from engine.kv.blocks import BlockPool
from engine.models.model_config import ModelConfig

_FILES = ("model.safetensors",)
_CANDIDATES = 4


def eagle_config(model: ModelConfig) -> ModelConfig:
    """The shape of the head's one layer, which is that of the model's layers without windows."""
    return replace(model, layers=1, windows=(None,))


class EagleHead:
    """The head's layer; it has no norm before attention, and takes embedding and output from the model."""

    def __init__(self, folder: Path, model: ModelConfig, dtype: torch.dtype) -> None:
        """Reads `fc` and `layers.0` as EAGLE's checkpoints name them; raises ModelError."""
        hidden, inner = model.hidden_size, model.intermediate_size
        queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
        layer = "layers.0."
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, 2 * hidden),
            layer + "self_attn.q_proj.weight": (queries, hidden),
            layer + "self_attn.k_proj.weight": (keys, hidden),
            layer + "self_attn.v_proj.weight": (keys, hidden),
            layer + "self_attn.o_proj.weight": (hidden, queries),
            layer + "mlp.gate_proj.weight": (inner, hidden),
            layer + "mlp.up_proj.weight": (inner, hidden),
            layer + "mlp.down_proj.weight": (hidden, inner),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
        tensors = read_tensors(folder, _FILES, shapes, dtype)

        def linear(*names: str) -> Linear:
            return packed_linear(torch.cat([tensors[f"{layer}{name}.weight"] for name in names]), None)

        self._config = model
        self._frequencies = inverse_frequencies(model.rope, model.head_dim)
        self._fuse = packed_linear(tensors["fc.weight"], None)
        self._qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self._output = linear("self_attn.o_proj")
        self._norm = tensors[layer + "post_attention_layernorm.weight"]
        self._gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self._down = linear("mlp.down_proj")

    def __call__(
        self, embeddings: Tensor, features: Tensor, positions: Tensor, attention: BatchAttention
    ) -> Tensor:
        """The next hidden states [tokens, hidden].

        `embeddings` of the tokens and the `features` that they were drawn from, both [tokens, hidden];
        `positions` int64 [tokens].
        """
        config = self._config
        hidden = self._fuse(torch.cat((embeddings, features), dim=-1))
        cosine, sine = rotation(positions, self._frequencies, hidden.dtype)
        heads = self._qkv(hidden).view(hidden.shape[0], -1, config.head_dim)
        turning = config.heads + config.kv_heads
        turned = rotate(heads[:, :turning], cosine, sine)
        attended = attention(0, turned[:, : config.heads], turned[:, config.heads :], heads[:, turning:])
        hidden = hidden + self._output(attended)
        normed = F.rms_norm(hidden, self._norm.shape, self._norm, config.norm_eps)
        gate, up = self._gate_up(normed).chunk(2, dim=-1)
        return hidden + self._down(F.silu(gate).mul_(up))


class EagleDrafter:
    """RunnerDrafter over an EAGLE head whose KV lies in a cache of its own; trees grow by confidence."""

    def __init__(
        self,
        head: EagleHead,
        pool: BlockPool,
        attention: AttentionBackend,
        embed: Callable[[Tensor], Tensor],
        logits: Callable[[Tensor], Tensor],
        on_close: Callable[[], None],
    ) -> None:
        """`embed` and `logits` are the model's own: int64 [tokens] to [tokens, hidden], and to its logits."""
        self._head = head
        self._kv = HeldKv(pool)
        self._attention = attention
        self._embed = embed
        self._logits = logits
        self._on_close = on_close

    def close(self) -> None:
        """Gives the head's KV back."""
        self._on_close()

    def propose(self, sequences: Sequence[GrownSequence]) -> list[Proposal]:
        """See RunnerDrafter."""
        keys = {grown.request.key for grown in sequences}
        proposals: list[Proposal] = []
        for grown in sequences:
            held = self._kv.resume(grown.request.key, len(grown.request.tokens), grown.tokens)
            needed = held.computed + len(grown.drawn) + grown.request.limit
            if not self._kv.cover(grown.request.key, needed, keys):
                self._kv.forget(grown.request.key)
                continue
            proposals.append(self._propose(grown, held))
        return proposals

    def _propose(self, grown: GrownSequence, held: HeldSequence) -> Proposal:
        guessed: dict[tuple[int, ...], Tensor] = {(): self._feed(held, grown.drawn, grown.features)}
        held.computed += len(grown.drawn)

        def after(tokens: tuple[int, ...]) -> Candidates:
            # KV of guesses lies behind the sequence's own and is written anew for each path.
            if tokens:
                before = torch.stack([guessed[tokens[:depth]] for depth in range(len(tokens))])
                guessed[tokens] = self._feed(held, tokens, before)
            best = self._logits(guessed[tokens][None]).softmax(dim=-1).topk(_CANDIDATES, dim=-1)
            ids: list[int] = best.indices[0].tolist()
            shares: list[float] = best.values[0].tolist()
            return list(zip(ids, shares, strict=True))

        return Proposal(grown.request.key, grown.tokens, best_tree(after, grown.request.limit))

    def _feed(self, held: HeldSequence, tokens: Sequence[int], features: Tensor) -> Tensor:
        """Reads pairs after the held ones; returns the hidden state [hidden] that it guesses after them."""
        count = len(tokens)
        attention = self._attention.prepare([Span(0, count, held.computed, held.table)])
        positions = torch.arange(held.computed, held.computed + count)
        return self._head(self._embed(torch.tensor(tokens)), features, positions, attention)[-1]
