"""Edge: tiny random models of every family, and a way to look at the logits that a step computes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.cpu.attention import CpuAttention
from engine.cpu.linear import MakeProduct, packed_linear
from engine.decoder import Decoder
from engine.kv.kv_cache import KvCache
from engine.models.model_config import ModelConfig, read_model_config
from engine.models.weights import read_weights
from engine.native.team import team_of_torch
from engine.step import SampledToken, SampleRequest, SequenceSlice, StepPlan
from engine.torch_runner import TorchStepRunner
from tandem.ids import BlockId
from tandem.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def family_configs() -> dict[str, Any]:
    """Configurations that between them use every feature of ModelConfig."""
    linear = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    return {
        "llama": transformers.LlamaConfig(**SIZES),
        "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
        "llama-rope-llama3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
        "llama-rope-linear": transformers.LlamaConfig(**SIZES, rope_parameters=linear),
        "llama-biased": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "mistral-window": transformers.MistralConfig(**SIZES, sliding_window=7),
        "mistral-full": transformers.MistralConfig(**SIZES, sliding_window=None),
        "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen2-some-windows": transformers.Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1
        ),
        "qwen3": transformers.Qwen3Config(**SIZES, head_dim=12),
    }


def random_model(config: Any, seed: int = 0) -> Any:
    """A transformers model in float32 whose norms and biases are random too."""
    torch.manual_seed(seed)
    make: Any = transformers.AutoModelForCausalLM
    model = make.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def reference_logits(model: Any, token_ids: Sequence[int]) -> Tensor:
    """transformers' logits at every position, [tokens, vocabulary]."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(token_ids)])).logits[0]
    return logits


@dataclass
class RecordingSampler:
    """Keeps the logits of the last step and draws the most probable tokens."""

    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def sample(self, logits: Tensor, requests: Sequence[SampleRequest]) -> list[SampledToken]:
        """See TokenSampler."""
        self.logits = logits.clone()
        return [
            SampledToken(request.key, request.sample_index, int(row.argmax()), None)
            for request, row in zip(requests, logits, strict=True)
        ]


@dataclass
class Engine:
    """A runner whose logits can be looked at."""

    config: ModelConfig
    cache: KvCache
    runner: TorchStepRunner
    sampler: RecordingSampler

    def step(self, *slices: SequenceSlice) -> Tensor:
        """Logits of every sampled row, [rows, vocabulary]."""
        self.runner.run(StepPlan(0, slices))
        return self.sampler.logits


@contextmanager
def open_engine(
    folder: Path,
    num_blocks: int = 64,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    product: MakeProduct = packed_linear,
    native: bool = True,
) -> Iterator[Engine]:
    """An Engine over a folder, on one thread; `native` loops, on two, where they can do the dtype."""
    device = torch.device("cpu")
    config = read_model_config(folder)
    team = team_of_torch(2) if native and dtype == torch.float32 else None
    decoder = Decoder(config, read_weights(folder, config, dtype, device), product, team)
    sampler = RecordingSampler()
    with KvCache(config, num_blocks, block_size, dtype, device) as cache:
        runner = TorchStepRunner(
            decoder, cache, CpuAttention(cache, config, team), sampler, device, threads=1
        )
        yield Engine(config, cache, runner, sampler)


def slice_of(
    token_ids: Sequence[int], start: int, table: Sequence[int], samples: int = 1, key: int = 0
) -> SequenceSlice:
    """A slice that draws `samples` greedy tokens."""
    requests = tuple(SampleRequest(key, index, 0, GREEDY) for index in range(samples))
    return SequenceSlice(token_ids, start, [BlockId(block) for block in table], requests)
