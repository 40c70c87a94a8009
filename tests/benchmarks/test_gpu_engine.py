"""The GPU's engine checks, of a tiny model on the CPU: every figure stands beside its floor."""

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu_engine import DECODE_SHARE, Load, step_figures
from benchmarks.gpu_kernels import LLAMA_3_8B, DeviceLimits
from tests.engine.cuda.host_accelerator import HostAccelerator

TINY = replace(
    LLAMA_3_8B,
    vocabulary_tokens=64,
    hidden_size=32,
    intermediate_size=48,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=16,
    windows=(None,),
)
LOAD = Load(batches=(1, 2), context_tokens=6, prompt_tokens=8, block_size=4, rounds=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels would be compiled for the device")
@pytest.mark.parametrize(
    ("limits", "holds"), [(DeviceLimits(1.0, 1.0), True), (DeviceLimits(1e18, 1e18), False)]
)
def test_steps_stand_beside_their_floors(limits: DeviceLimits, holds: bool) -> None:
    figures = step_figures(TINY, torch.float32, HostAccelerator(2**31, 2**31, 0), limits, LOAD)
    assert [figure.what for figure in figures] == [
        "decode of 1 layers of 32, batch 1 at 6 tokens",
        "decode of 1 layers of 32, batch 2 at 6 tokens",
        "prefill of 1 layers of 32, 8 tokens",
    ]
    assert all(figure.holds is holds for figure in figures)
    assert figures[0].limit == f">= {DECODE_SHARE:.2f}"
