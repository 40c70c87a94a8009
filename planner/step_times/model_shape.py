"""Pure: a model's dimensions, and what follows from them: weights, KV, FLOPs."""

from dataclasses import dataclass

from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer; `mlp_matrices` is 3 for gated layers, 2 for plain ones."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    mlp_matrices: int = 3
    tied_embeddings: bool = False
    value_bytes: int = 2

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.mlp_matrices * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        """Parameters of the output matrix."""
        return self.hidden * self.vocabulary

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights (norms and biases, which are below 0.1 %, left out)."""
        ends = self.head_weights * (1 if self.tied_embeddings else 2)
        return (self.layers * self.layer_weights + ends) * self.value_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.value_bytes


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("opt-13b", 40, 5120, 40, 40, 128, 20480, 50272, mlp_matrices=2, tied_embeddings=True),
        ModelShape("opt-66b", 64, 9216, 72, 72, 128, 36864, 50272, mlp_matrices=2, tied_embeddings=True),
        ModelShape("opt-175b", 96, 12288, 96, 96, 128, 49152, 50272, mlp_matrices=2, tied_embeddings=True),
        ModelShape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
        ModelShape("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000),
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        ModelShape("smollm2", 30, 576, 9, 3, 64, 1536, 49152, tied_embeddings=True, value_bytes=4),
    )
}
"""Known models by name, dimensions from their published configurations."""


def model_named(name: str) -> ModelShape:
    """A known model. Raises ConfigError that lists them."""
    if name not in MODELS:
        raise ConfigError(f"no model is called {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


def kv_capacity_tokens(model: ModelShape, memory_bytes: float, devices: int, usable: float) -> int:
    """Tokens whose KV fits beside the weights on `devices` devices; 0 or less when the weights alone do
    not fit.

    `usable` is the share of memory that weights and KV may take; the rest is for activations and the runtime.
    """
    return int((memory_bytes * devices * usable - model.weight_bytes) // model.kv_bytes_per_token)
