"""Edge: Medusa heads (Cai et al. 2024): each guesses one token further ahead from the same hidden state."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.drafting.draft import Proposal
from engine.drafting.guess_tree import Candidates, best_tree
from engine.drafting.head_weights import read_count, read_tensors
from engine.drafting.runner_drafter import GrownSequence
from engine.models.model_config import ModelConfig

_FILES = ("medusa_lm_head.safetensors", "model.safetensors")
_CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class MedusaHead:
    """Residual blocks (weight [hidden, hidden], bias [hidden]) and a projection [vocabulary, hidden]."""

    blocks: tuple[tuple[Tensor, Tensor], ...]
    projection: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Float32 logits [rows, vocabulary] from the model's last hidden states [rows, hidden]."""
        for weight, bias in self.blocks:
            features = features + F.silu(F.linear(features, weight, bias))
        return F.linear(features, self.projection).float()


def read_medusa(
    folder: Path, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[MedusaHead, ...]:
    """The heads of a folder (names as FasterDecoding/Medusa saves them); raises ModelError."""
    heads = read_count(folder, "medusa_num_heads")
    layers = read_count(folder, "medusa_num_layers", 1)
    hidden, vocabulary = model.hidden_size, model.vocabulary_tokens
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(heads):
        for layer in range(layers):
            shapes[f"{head}.{layer}.linear.weight"] = (hidden, hidden)
            shapes[f"{head}.{layer}.linear.bias"] = (hidden,)
        shapes[f"{head}.{layers}.weight"] = (vocabulary, hidden)
    stored = read_tensors(folder, _FILES, shapes, dtype)
    tensors = {name: tensor.to(device) for name, tensor in stored.items()}
    return tuple(
        MedusaHead(
            tuple(
                (tensors[f"{head}.{layer}.linear.weight"], tensors[f"{head}.{layer}.linear.bias"])
                for layer in range(layers)
            ),
            tensors[f"{head}.{layers}.weight"],
        )
        for head in range(heads)
    )


class MedusaDrafter:
    """RunnerDrafter over Medusa heads; holds nothing between steps."""

    def __init__(self, heads: Sequence[MedusaHead]) -> None:
        self._heads = heads

    def close(self) -> None:
        """Nothing to give back."""

    def propose(self, sequences: Sequence[GrownSequence]) -> list[Proposal]:
        """A tree for each sequence: head i's best tokens at depth i + 1."""
        if not sequences:
            return []
        # The state that gave the last token; the token itself is known, the heads go on from there.
        last = torch.stack([grown.features[-1] for grown in sequences])
        best = [head(last).softmax(dim=-1).topk(_CANDIDATES, dim=-1) for head in self._heads]
        ids: list[list[list[int]]] = [head.indices.tolist() for head in best]
        shares: list[list[list[float]]] = [head.values.tolist() for head in best]
        proposals: list[Proposal] = []
        for row, grown in enumerate(sequences):
            levels = [list(zip(ids[head][row], shares[head][row], strict=True)) for head in range(len(best))]

            def after(path: tuple[int, ...], levels: Sequence[Candidates] = levels) -> Candidates:
                return levels[len(path)] if len(path) < len(levels) else ()

            proposals.append(Proposal(grown.request.key, grown.tokens, best_tree(after, grown.request.limit)))
        return proposals
