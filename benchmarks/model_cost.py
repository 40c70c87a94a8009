"""Pure: bytes that a decode step must read and operations that a prompt takes, from a model's shape."""

from engine.models.model_config import ModelConfig


def layer_parameters(config: ModelConfig) -> int:
    """Weights of all layers' projections; biases and norms are too few to count."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = config.hidden_size * (query + 2 * key) + query * config.hidden_size
    return config.layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def read_parameters(config: ModelConfig) -> int:
    """Weights that every decode step reads: the layers' and the head's, but of an embedding only rows."""
    return layer_parameters(config) + config.vocabulary_tokens * config.hidden_size


def kv_elements_per_token(config: ModelConfig) -> int:
    """Numbers that the cache keeps for a token: K and V of every layer."""
    return 2 * config.layers * config.kv_heads * config.head_dim


def decode_flops(config: ModelConfig, batch: int, context_tokens: int) -> float:
    """Operations of one decode step; `context_tokens` is the sum over the batch."""
    attention = 4 * config.layers * config.heads * config.head_dim * context_tokens
    return 2.0 * read_parameters(config) * batch + attention


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """Operations of one whole prompt: its layers, its causal attention, and the head for its last token."""
    attention = 4 * config.layers * config.heads * config.head_dim * tokens * (tokens + 1) // 2
    head = 2 * config.vocabulary_tokens * config.hidden_size
    return 2.0 * layer_parameters(config) * tokens + attention + head
