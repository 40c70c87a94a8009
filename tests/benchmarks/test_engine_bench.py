"""`tandem bench engine` and `tandem profile` on a tiny model: what they count, and that the page says it."""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import engine, engine_profile, machine_limits
from benchmarks.engine import DecodeRun, Sizes, decode_json
from benchmarks.engine_drive import StepTimes
from benchmarks.engine_profile import grid, transfer_layout
from benchmarks.kv_waste import calculated_kv_waste, held_conversations
from benchmarks.machine_limits import MachineLimits
from benchmarks.model_cost import decode_flops, kv_elements_per_token, prefill_flops, read_parameters
from benchmarks.sharegpt_lengths import SHAREGPT
from engine.models.model_config import read_model_config
from engine.models.model_source import resolve_model
from planner.step_times.profile_file import measured_link, read_profile
from tests.engine.tiny_models import family_configs, random_model
from tests.tandem.test_json_output import documented, keys_of

LIMITS = MachineLimits(40.0, 400.0)
SMALL = Sizes(
    decode=((1, 16, 8, 1), (3, 32, 8, 3)),
    prefill=(2, 64),
    cached_prompt=96,
    profiled=(2, 16, 4),
    runs=1,
    speculative=(16, 1),
    pool_blocks=32,
    conversations=(3, 6),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    random_model(family_configs()["llama"]).save_pretrained(path)
    words = {"?": 0, "INFO": 1, "worker": 2, "step": 3, "batch": 4, "tokens": 5, "free": 6, "blocks": 7}
    tokenizer = {
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "?"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes half a gigabyte, and their values are the machine's."""
    torch.set_num_threads(1)
    monkeypatch.setattr(engine, "measure_limits", lambda dtype: LIMITS)


def test_every_figure_is_measured_and_documented(folder: Path) -> None:
    result = engine.measure(str(folder), "float32", 1, SMALL)
    assert sorted(keys_of(result)) == sorted(documented("tandem bench engine"))
    assert [one["batch"] for one in result["decode"]] == [1, 3]
    assert all(one["tokens_per_s"] > one["tokens_per_s_with_prefill"] / 2 > 0 for one in result["decode"])
    assert 0 < result["overhead"]["outside_kernels_share"] < 1
    assert result["memory"]["resident_bytes"] > result["memory"]["pool_bytes"]
    assert (result["speculative"]["output_tokens"], result["speculative"]["identical"]) == (16, True)
    assert "of weights + pool" in engine.text(result)


def test_waste_is_what_the_last_blocks_leave_empty(folder: Path) -> None:
    """16 tokens and 7 steps in blocks of 16: two blocks hold 17 to 22 tokens while the batch lives."""
    (one, *_) = engine.measure(str(folder), "float32", 1, SMALL)["decode"]
    assert one["kv_waste"] == pytest.approx(1 - sum(range(17, 23)) / 6 / 32)


def test_waste_of_conversations_is_what_the_pool_gave_out_and_nobody_wrote(folder: Path) -> None:
    """The pool of 512 tokens has room for one conversation, cut at 224: a step makes it 15 blocks."""
    counted = engine.measure(str(folder), "float32", 1, SMALL)["kv_waste"]
    assert counted["conversations"] == 1
    assert 225 <= counted["mean_context_tokens"] < 230
    assert counted["share"] == pytest.approx(1 - counted["mean_context_tokens"] / 240)
    assert counted["share_short_contexts"] == pytest.approx(1 - sum(range(17, 23)) / 6 / 32)


def test_conversations_are_met_at_any_of_their_steps() -> None:
    held = held_conversations(4000, 10_000)
    assert held == held_conversations(4000, 10_000)
    lengths = set(SHAREGPT)
    assert all(one.left_tokens >= 1 for one in held)
    assert all(
        any(
            prompt < one.context_tokens and one.context_tokens + one.left_tokens == prompt + output
            for prompt, output in lengths
        )
        for one in held[:50]
    )
    steps = sum(output - 1 for _, output in SHAREGPT)
    mean = sum(sum(range(1, output)) for _, output in SHAREGPT) / steps
    assert statistics.mean(one.left_tokens for one in held) == pytest.approx(mean, rel=0.05)
    assert max(one.context_tokens for one in held_conversations(100, 300)) == 300


def test_waste_calculated_of_one_conversation() -> None:
    """15, 16 and 17 tokens in blocks of 16: 48 of 64 places."""
    assert calculated_kv_waste([(15, 3)], 16) == pytest.approx(1 - 48 / 64)


def test_model_cost_of_smollm2_is_known() -> None:
    model = read_model_config(resolve_model("smollm2"))
    assert read_parameters(model) == 134_479_872
    assert kv_elements_per_token(model) * 4 == 737_280 // 16
    assert decode_flops(model, 2, 0) == 4 * 134_479_872
    assert prefill_flops(model, 1) == 2 * 134_479_872 + 4 * 30 * 576


def test_a_limit_is_that_of_the_fastest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways of 3 s and 2 s; the second takes 1 s once it runs again."""
    now_s = 0.0
    slow, fast = iter((3.0, 3.0)), iter((5.0, 2.0, 1.0, 4.0))

    def way(durations_s: Iterator[float]) -> None:
        nonlocal now_s
        now_s += next(durations_s)

    monkeypatch.setattr("benchmarks.machine_limits.time.perf_counter", lambda: now_s)
    assert machine_limits.best_s((lambda: way(slow), lambda: way(fast)), runs=2) == 1.0


def test_shares_are_limit_over_measured() -> None:
    model = read_model_config(resolve_model("smollm2"))
    floor_s = 134_479_872 * 4 / 40e9
    times = StepTimes((2 * floor_s,) * 3, (floor_s,) * 3)
    one = decode_json(DecodeRun(1, 32, 4, times, times, 0.0), model, 4, LIMITS)
    assert one["bandwidth_share"] == pytest.approx(0.5)
    assert one["limited_by"] == "bandwidth"
    assert one["tokens_per_s"] == pytest.approx(1 / (2 * floor_s))
    many = decode_json(DecodeRun(64, 32, 4, times, times, 0.0), model, 4, LIMITS)
    assert many["limited_by"] == "compute"


def test_standard_output_holds_the_profile_and_no_logs(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = argparse.Namespace(
        model=str(folder), dtype="float32", threads=1, runs=1, quick=True, output=None
    )
    assert engine_profile.run(chosen) == 0
    assert json.loads(capfd.readouterr().out)["kind"] == "tandem profile"


def test_a_profile_is_written_as_documented(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "profile.json"
    chosen = argparse.Namespace(
        model=str(folder), dtype="float32", threads=1, runs=2, quick=True, output=output
    )
    assert engine_profile.run(chosen) == 0
    result = json.loads(output.read_text())
    assert sorted(keys_of(result)) == sorted(documented("tandem profile"))
    assert result["kv_bytes_per_token"] == 2 * 3 * 2 * 8 * 4
    assert all(point["seconds"] > 0 and point["runs"] == 2 for point in result["points"])
    assert result["step_overhead_s"] > 0
    assert result["points"][-1]["prompts"] == [[16, 0]]
    assert (result["points"][-1]["decode_batch"], result["points"][-1]["decode_context_tokens"]) == (2, 128)
    block_bytes = result["kv_bytes_per_token"] * result["block_size"]
    assert [(one["transport"], one["bytes"]) for one in result["transfers"]] == [
        ("shm", block_bytes),
        ("tcp", block_bytes),
    ]
    assert all(one["seconds"] > 0 and one["runs"] == 2 for one in result["transfers"])
    link = measured_link(read_profile(result, "test"), "shm")
    assert link is not None
    assert link.seconds(block_bytes) == result["transfers"][0]["seconds"]


def test_transfers_grow_to_what_memory_allows() -> None:
    model = read_model_config(resolve_model("smollm2"))
    assert transfer_layout(model, quick=False).counts == (1, 4, 16, 64)
    assert transfer_layout(replace(model, layers=120), quick=False).counts == (1, 4, 16)
    assert transfer_layout(replace(model, layers=12_000), quick=False).counts == (1,)
    assert transfer_layout(model, quick=True).counts == (1,)


def test_the_grid_fits_context_and_pool() -> None:
    shapes = grid(token_budget=512, context_tokens=2048, pool_tokens=16_384)
    assert max(shape.kv_tokens for shape in shapes) <= 8192
    assert any(shape.prompts and shape.batch for shape in shapes)
    assert max(tokens + before for shape in shapes for tokens, before in shape.prompts) <= 2048
    assert max(sum(tokens for tokens, _ in shape.prompts) for shape in shapes) == 512
