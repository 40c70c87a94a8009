"""What the benchmark of KV policies counts and scores."""

from pathlib import Path

import pytest
import torch

from benchmarks.kv_policies import task_of
from benchmarks.kv_policy_reader import (
    BLOCK_SIZE,
    CPU,
    DEFAULT,
    POLICIES,
    Policy,
    Reader,
    continued,
    read_bytes,
)
from engine.decoder import Decoder
from engine.kv_cache import KvCache
from engine.linear import stored_linear
from engine.model_config import read_model_config
from engine.model_source import resolve_model
from engine.tokenizer import Tokenizer
from engine.weights import read_weights
from tandem.errors import InvalidRequest
from tests.engine.tiny_models import family_configs, random_model, reference_logits

QUEST = Policy("quest 2", torch.float32, 2)


def test_perplexity_is_that_of_the_model(tmp_path: Path) -> None:
    """Of tokens fed one by one after a prompt of whole blocks, against transformers in one pass."""
    model = random_model(family_configs()["llama"])
    model.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    decoder = Decoder(config, read_weights(tmp_path, config, torch.float32, CPU), stored_linear)
    sequence = [(11 * place * place + 5) % 101 for place in range(2 * BLOCK_SIZE + 9)]
    prompt, rest = sequence[: 2 * BLOCK_SIZE], sequence[2 * BLOCK_SIZE :]
    logits = reference_logits(model, sequence)[2 * BLOCK_SIZE :]
    chosen = logits[:-1].log_softmax(1).gather(1, torch.tensor(rest[1:])[:, None])
    with torch.inference_mode(), KvCache(config, 4, BLOCK_SIZE, torch.float32, CPU) as cache:
        reader = Reader(decoder, config, cache)
        reader.read(prompt)
        for policy in (POLICIES[0], DEFAULT):
            perplexity, likeliest = continued(reader, policy, len(prompt), rest)
            assert perplexity == pytest.approx(float(chosen.mean().neg().exp()), rel=1e-4)
            assert likeliest == logits.argmax(1).tolist()


def test_bytes_are_counted_from_the_layout(tmp_path: Path) -> None:
    random_model(family_configs()["llama"]).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    row, page = 8 * 4, 2 * BLOCK_SIZE * 2 * 8 * 4
    assert (config.layers, config.kv_heads, config.head_dim) == (3, 2, 8)
    assert read_bytes(config, POLICIES[0], 5 * BLOCK_SIZE) == 3 * 5 * page
    assert read_bytes(config, QUEST, 2 * BLOCK_SIZE) == 3 * 2 * page
    bounds = 4 * 2 * 2 * row
    assert read_bytes(config, QUEST, 5 * BLOCK_SIZE) == 2 * 5 * page + 2 * page + bounds
    assert read_bytes(config, Policy("", torch.int8), BLOCK_SIZE) == 3 * 2 * BLOCK_SIZE * 2 * (8 + 4)


def test_a_text_that_is_too_short_is_refused() -> None:
    tokenizer = Tokenizer.load(resolve_model("smollm2"))
    with pytest.raises(InvalidRequest, match="fewer than"):
        task_of(tokenizer, "short", 64, 16)
