"""The comparison with vLLM: real processes, a vLLM whose answers are known, figures that follow from them."""

import argparse
import stat
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import vllm_cpu
from benchmarks.vllm_cpu import (
    CASES,
    Binding,
    Case,
    Generated,
    Turn,
    case_json,
    environment,
    measure,
    text,
    tokens_per_s,
)
from tandem.errors import TandemError
from tests.engine.tiny_models import family_configs, random_model
from tests.tandem.test_json_output import documented, keys_of

STAND_IN = '''
"""Answers 7 for every token, after what the environment and the settings say."""
import os
__version__ = "0.0-stand-in"
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert (temperature, ignore_eos, detokenize) == (0.0, True, False)
        self.max_tokens = max_tokens
class _Output:
    def __init__(self, tokens):
        self.token_ids = tokens
class _Result:
    def __init__(self, tokens):
        self.outputs = [_Output(tokens)]
class LLM:
    def __init__(self, model, dtype, max_model_len, max_num_seqs, enforce_eager, enable_prefix_caching,
                 skip_tokenizer_init, seed):
        assert os.path.exists(os.path.join(model, "config.json"))
        assert (dtype, enforce_eager, enable_prefix_caching) == ("float32", False, False)
        print("a log line on stdout, where no answer may be looked for")
    def generate(self, prompts, params, use_tqdm):
        assert all(isinstance(token, int) for prompt in prompts for token in prompt["prompt_token_ids"])
        return [_Result([7] * params.max_tokens) for _ in prompts]
'''


def venv_with(folder: Path, module: str) -> Path:
    """A folder like a virtual environment whose `vllm` is this source."""
    (folder / "bin").mkdir(parents=True)
    (folder / "vllm.py").write_text(module)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path / "model"
    random_model(family_configs()["llama"]).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def chosen(venv: Path, model: Path) -> argparse.Namespace:
    return argparse.Namespace(
        venv=venv,
        model=str(model),
        dtype="float32",
        threads=1,
        rounds=1,
        eager=False,
        vllm_binding="tuned",
        json=True,
    )


async def test_both_engines_are_asked_and_every_figure_is_documented(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = (Case("decode_8", 8, 16, 4), Case("prefill", 2, 32, 1))
    monkeypatch.setattr(vllm_cpu, "CASES", cases)
    monkeypatch.setattr(vllm_cpu, "SETTLE_S", 0.0)
    result = await measure(chosen(venv_with(tmp_path / "venv", STAND_IN), model))
    assert sorted(keys_of(result)) == sorted(documented("python -m benchmarks.vllm_cpu"))
    assert (result["vllm"], result["vllm_compiled"]) == ("0.0-stand-in", True)
    assert result["vllm_binding"] == "tuned"
    assert [case["name"] for case in result["cases"]] == ["decode_8", "prefill"]
    for case in result["cases"]:
        assert case["tandem_tokens_per_s"] > 0
        known = case["vllm_tokens_per_s"] is not None
        assert case["ratio"] == (case["tandem_tokens_per_s"] / case["vllm_tokens_per_s"] if known else None)
        assert case["same_outputs"] == 0.0, "nobody else answers 7 all the time"


async def test_an_environment_without_vllm_is_an_error(tmp_path: Path, model: Path) -> None:
    with pytest.raises(TandemError, match="ended with code 1"):
        await measure(chosen(venv_with(tmp_path / "venv", "raise ImportError('broken')"), model))


@pytest.mark.parametrize("option", ["threads", "rounds"])
async def test_a_number_that_measures_nothing_is_refused_before_vllm_starts(
    option: str, tmp_path: Path, model: Path
) -> None:
    asked = chosen(tmp_path / "no such environment", model)
    setattr(asked, option, 0)
    with pytest.raises(TandemError, match=f"--{option} must be positive"):
        await measure(asked)


def turn(first_s: float, whole_s: float, *outputs: tuple[int, ...]) -> Turn:
    return Turn(first_s, Generated(whole_s, outputs))


def test_decode_rate_leaves_the_prompts_out() -> None:
    case = Case("decode_8", 8, 32, 5)
    assert tokens_per_s(case, [turn(1.0, 3.0)]) == 8 * 4 / 2.0
    assert tokens_per_s(Case("prefill", 8, 512, 1), [turn(0.0, 2.0)]) == 8 * 512 / 2.0


def test_one_disturbed_round_does_not_make_a_rate() -> None:
    """The second round's first tokens alone took longer than its whole."""
    case = Case("decode_8", 8, 32, 5)
    assert tokens_per_s(case, [turn(1.0, 3.0), turn(9.0, 3.1), turn(1.1, 3.2)]) == 8 * 4 / (3.1 - 1.1)


def test_a_rate_that_would_be_negative_is_unknown() -> None:
    case = Case("decode_8", 1, 32, 5)
    busy = [turn(4.0, 3.0, (1,))]
    assert tokens_per_s(case, busy) is None
    found = case_json(case, {"tandem": [turn(1.0, 2.0, (1,))], "vllm": busy})
    assert (found["tandem_tokens_per_s"], found["vllm_tokens_per_s"], found["ratio"]) == (4.0, None, None)
    head = {"model": "m", "dtype": "d", "threads": 2, "machine": "x", "vllm": "1", "vllm_compiled": True}
    printed = text(head | {"vllm_binding": "defaults", "cases": [found]})
    assert "vLLM unknown, the machine was too busy" in printed
    assert "its default cores" in printed


def test_a_case_is_the_ratio_of_medians_and_the_share_of_equal_outputs() -> None:
    case = Case("decode_8", 2, 32, 5)
    ours = [turn(1.0, 2.0, (1, 2), (3, 4)), turn(1.0, 3.0, (1, 2), (3, 4)), turn(1.0, 9.0, (1, 2), (3, 4))]
    theirs = [turn(1.0, 7.0, (1, 2), (3, 5))] * 3
    found = case_json(case, {"tandem": ours, "vllm": theirs})
    assert (found["ratio"], found["same_outputs"], found["target"]) == (3.0, 0.5, 3.0)
    assert found["whole_ratio"] == pytest.approx(7 / 3)


def test_issue_4s_batches_are_among_the_cases() -> None:
    assert {case.name for case in CASES} == {"decode_1", "decode_8", "decode_32", "prefill"}


def test_vllm_gets_as_many_cores_and_nothing_of_our_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "all of them")
    found = environment(1, Binding.TUNED)
    assert "PYTHONPATH" not in found
    assert len(found["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == 1
    assert found["OMP_NUM_THREADS"] == "1"


def test_by_default_vllm_chooses_its_cores_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = environment(2, Binding.DEFAULTS)
    assert [name for name in found if name.startswith(("VLLM_", "OMP_"))] == ["VLLM_CPU_KVCACHE_SPACE"]
