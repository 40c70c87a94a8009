"""Edge: a model of any shape, of which the tests need its cache and attention alone."""

from engine.models.model_config import ModelConfig, RopeConfig


def shape(heads: int, kv_heads: int, head_dim: int, windows: tuple[int | None, ...]) -> ModelConfig:
    """One layer for each window."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocabulary_tokens=64,
        hidden_size=heads * head_dim,
        intermediate_size=64,
        layers=len(windows),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        rope=RopeConfig(10000.0),
        context_tokens=4096,
        tied_embeddings=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=windows,
        eos_ids=(0,),
    )
