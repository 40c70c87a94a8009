"""Kernels run on torch's threads; their machine code outlives the process where a folder can be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from engine.native.row_passes import NativeRows
from engine.native.team import team_of_torch

torch.set_num_threads(1)
rows = NativeRows(team_of_torch(1), 0.0)
print(rows.normed(torch.tensor([[3.0, 4.0]]), torch.ones(2)).square().mean().item())
"""


def run(cache: Path) -> str:
    """What a process of its own prints, with its cache in that folder."""
    environment = {**os.environ, "TANDEM_CACHE": str(cache)}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    return finished.stdout


def test_code_is_kept_for_the_next_process(tmp_path: Path) -> None:
    assert float(run(tmp_path).splitlines()[-1]) == pytest.approx(1.0)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "native").rglob("*.nbc")}
    assert kept
    assert float(run(tmp_path).splitlines()[-1]) == pytest.approx(1.0)
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "native").rglob("*.nbc")}


def test_a_folder_that_cannot_be_written_costs_only_the_compilation(tmp_path: Path) -> None:
    occupied = tmp_path / "a-file"
    occupied.touch()
    output = run(occupied)
    assert "native code is not kept" in output
    assert float(output.splitlines()[-1]) == pytest.approx(1.0)
