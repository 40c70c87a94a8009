"""`make gpu-check`: what it says without a device, and the page it writes with one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_report import GpuFigure, GpuMachine, render

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("arguments", [(), ("--probe",)])
def test_without_a_device_it_says_so_in_one_sentence(arguments: tuple[str, ...], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = (sys.executable, "-m", "benchmarks.gpu_check", "--output", str(page), *arguments)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == "There is no CUDA device here, so nothing was checked.\n"
    assert not page.exists()


def test_it_needs_neither_ray_nor_redis() -> None:
    code = "import sys, benchmarks.gpu_check; sys.exit('ray' in sys.modules or 'redis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0


def test_page_names_machine_commit_and_every_figure_beside_its_limit() -> None:
    machine = GpuMachine("2026-01-02", "Some GPU, 80 GiB, 1 of them", "torch 2, CUDA 13", "abc123")
    page = render(
        machine, [GpuFigure("a copy", "3 GB/s"), GpuFigure("a kill", "3.1 s", "<= 2 s", holds=False)]
    )
    assert page.startswith("# GPU checks, 2026-01-02\n")
    assert "Some GPU, 80 GiB, 1 of them; torch 2, CUDA 13; commit abc123" in page
    assert "| a copy | 3 GB/s | - | yes |" in page
    assert "| a kill | 3.1 s | <= 2 s | NO |" in page
