"""Edge: rotary position embedding on torch tensors."""

import math

import torch
from torch import Tensor

from engine.model_config import RopeConfig, RopeKind


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Angular step of each pair of dimensions, float32 [head_dim / 2], on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (config.theta**exponents)
    if config.kind is RopeKind.DEFAULT:
        return plain
    if config.kind is RopeKind.LINEAR:
        return plain / config.factor
    return _llama3(plain, config)


def _llama3(plain: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1's scaling: slows long wavelengths by `factor`, keeps short ones, blends those between."""
    wavelength = 2 * math.pi / plain
    longest_kept = config.original_context_tokens / config.high_freq_factor
    shortest_slowed = config.original_context_tokens / config.low_freq_factor
    slowed = plain / config.factor
    share = (config.original_context_tokens / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - share) * slowed + share * plain
    scaled = torch.where(wavelength > shortest_slowed, slowed, blended)
    return torch.where(wavelength < longest_kept, plain, scaled)


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine for each position, both [tokens, 1, head_dim / 2] in `dtype`.

    `positions` is an integer tensor [tokens]; `frequencies` float32 [head_dim / 2].
    """
    angles = positions.to(torch.float32).unsqueeze(1) * frequencies  # [tokens, head_dim / 2]
    return angles.cos().to(dtype).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates [tokens, heads, head_dim] by the angles of its tokens; first half pairs with second half."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.empty_like(heads, memory_format=torch.contiguous_format)
    half = heads.shape[-1] // 2
    torch.mul(first, cosine, out=turned[..., :half]).addcmul_(second, sine, value=-1.0)
    torch.mul(second, cosine, out=turned[..., half:]).addcmul_(first, sine)
    return turned
