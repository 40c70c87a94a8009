"""Edge: rotary position embedding on torch tensors."""

import math

import torch
from torch import Tensor

from engine.models.model_config import RopeConfig, RopeKind


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
    """Cosine and signed sine for each position, both [tokens, 1, head_dim] in `dtype`, for `rotate`.

    `positions` is an integer tensor [tokens]; `frequencies` float32 [head_dim / 2].
    """
    angles = positions.to(torch.float32).unsqueeze(1) * frequencies  # [tokens, head_dim / 2]
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cosine, cosine), dim=-1).unsqueeze(1), torch.cat((-sine, sine), dim=-1).unsqueeze(1)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates [tokens, heads, head_dim] by the angles of its tokens; first half pairs with second half."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return torch.mul(heads, cosine).addcmul_(swapped, sine)
