"""Ways to keep weights: each is measured and scored beside float32, as the page says."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks.weight_types import measure
from tests.engine.tiny_models import family_configs, random_model
from tests.tandem.test_json_output import documented, keys_of


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="weights of eight bits need VNNI")
def test_each_way_is_measured_and_scored(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    random_model(family_configs()["llama"]).save_pretrained(tmp_path)
    shape = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 2048}))
    words = {"?": 0, "one": 5, "two": 6, "three": 7}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "model": {"type": "WordLevel", "vocab": words, "unk_token": "?"},
                "pre_tokenizer": {"type": "WhitespaceSplit"},
            }
        )
    )
    text = tmp_path / "text"
    text.write_text("one two three two one " * 110)
    result = measure(
        argparse.Namespace(
            model=str(tmp_path), text=text, windows=1, threads=1, rounds=1, output_tokens=3, batches=[1, 2]
        )
    )
    assert sorted(keys_of(result)) == sorted(documented("python -m benchmarks.weight_types"))
    float32, int8, bfloat16 = result["kinds"]
    assert [float32["name"], int8["name"], bfloat16["name"]] == ["float32", "int8", "bfloat16"]
    assert [one["figure"] for one in int8["rates"]] == ["decode_1", "decode_2", "prefill"]
    assert (float32["perplexity_ratio"], float32["same_greedy"]) == (1.0, 1.0)
    for other in (int8, bfloat16):
        assert 0.8 < other["perplexity_ratio"] < 1.2
        assert other["perplexity"] != float32["perplexity"]
