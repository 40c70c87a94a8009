"""Edge: weights of a given shape that no training made, for measurements without files."""

import torch
from torch import Tensor

from engine.models.model_config import ModelConfig
from engine.models.weights import expected_tensors

_SPREAD = 0.02


def random_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """All tensors of `expected_tensors`: norms of 1, biases of 0, the rest normal; equal for equal seeds."""
    generator = torch.Generator(device).manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in expected_tensors(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            weights[name] = tensor.fill_(1.0)
        elif name.endswith(".bias"):
            weights[name] = tensor.zero_()
        else:
            weights[name] = tensor.normal_(0.0, _SPREAD, generator=generator)
    return weights
