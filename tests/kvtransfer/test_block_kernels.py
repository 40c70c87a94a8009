"""wsum64 on the host and in a kernel, and the copying kernel: in Triton's interpreter without a GPU."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import weighted_sum

GPU = torch.cuda.is_available()
if not GPU:
    # Triton looks at it when a kernel is defined, so it comes before the kernels' import.
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if GPU else ["cpu"]

import triton.language as tl  # noqa: E402

from kvtransfer.cuda import block_kernels  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def reference(data: bytes) -> int:
    """As the module's docstring has it, word by word."""
    total = 0
    for place in range(len(data) // 4):
        mixed = (place + 1) * weighted_sum.MIX_FIRST % 2**64
        mixed ^= mixed >> 32
        mixed = mixed * weighted_sum.MIX_SECOND % 2**64
        mixed ^= mixed >> 32
        total += int.from_bytes(data[4 * place : 4 * place + 4], "little") * (mixed | 1)
    return (total + len(data) // 4 * weighted_sum.LENGTH_FACTOR) % 2**64


words = st.binary(max_size=200).map(lambda data: data[: len(data) // 4 * 4])


@given(words)
def test_host_sum_is_the_formula(data: bytes) -> None:
    assert weighted_sum.weighted_sum(memoryview(data)) == reference(data)


def test_host_sum_of_many_chunks_is_the_formula() -> None:
    data = random.Random(1).randbytes(4 * 70_000)
    assert weighted_sum.weighted_sum(memoryview(data)) == reference(data)


@given(words.filter(bool), st.data())
def test_no_change_of_one_word_goes_unseen(data: bytes, drawn: st.DataObject) -> None:
    changed = bytearray(data)
    changed[drawn.draw(st.integers(0, len(data) - 1))] ^= drawn.draw(st.integers(1, 255))
    assert weighted_sum.weighted_sum(memoryview(changed)) != weighted_sum.weighted_sum(memoryview(data))


@given(words)
def test_words_in_other_places_and_other_lengths_are_seen(data: bytes) -> None:
    mine = weighted_sum.weighted_sum(memoryview(data))
    turned = data[4:] + data[:4]
    assert (turned == data) is (weighted_sum.weighted_sum(memoryview(turned)) == mine)
    assert weighted_sum.weighted_sum(memoryview(data + bytes(4))) != mine


@pytest.mark.parametrize("words_each", [1, 100, block_kernels.SUM_WORDS, block_kernels.SUM_WORDS + 7])
@pytest.mark.parametrize("device", DEVICES)
def test_kernel_sums_as_the_host_does(words_each: int, device: str) -> None:
    size = 4 * words_each
    pool = torch.randint(0, 256, (5, size + 16), dtype=torch.uint8, generator=torch.manual_seed(1)).to(device)
    indices = torch.tensor([4, 0, 3], device=device)
    programs = -(-words_each // block_kernels.SUM_WORDS)
    sums = torch.zeros((3, programs), dtype=torch.int64, device=device)
    block_kernels.sum_pieces[(3, programs)](
        pool.data_ptr() + 8, size + 16, indices, words_each, sums, COUNT=block_kernels.SUM_WORDS
    )
    found = [(total + words_each * weighted_sum.LENGTH_FACTOR) % 2**64 for total in sums.sum(1).tolist()]
    expected = [
        weighted_sum.weighted_sum(memoryview(pool[index, 8 : 8 + size].cpu().numpy().tobytes()))
        for index in (4, 0, 3)
    ]
    assert found == expected


@pytest.mark.parametrize("size", [1, 24, 4096 * 8, 4096 * 8 * 2 + 24])
@pytest.mark.parametrize("device", DEVICES)
def test_copy_kernel_moves_pieces_and_nothing_else(size: int, device: str) -> None:
    word, word_bytes = (tl.int64, 8) if size % 8 == 0 else (tl.int8, 1)
    generator = torch.manual_seed(1)
    source = torch.randint(0, 256, (6, size + 8), dtype=torch.uint8, generator=generator).to(device)
    target = torch.randint(0, 256, (7, size + 40), dtype=torch.uint8, generator=generator).to(device)
    expected = target.clone()
    expected[[6, 2, 0], 32 : 32 + size] = source[[1, 5, 4], 8 : 8 + size]
    count = block_kernels.COPY_WORDS
    block_kernels.copy_pieces[(3, -(-(size // word_bytes) // count))](
        *(source.data_ptr() + 8, size + 8, torch.tensor([1, 5, 4], device=device)),
        *(target.data_ptr() + 32, size + 40, torch.tensor([6, 2, 0], device=device)),
        size // word_bytes,
        WORD=word,
        COUNT=count,
    )
    assert torch.equal(target, expected)


def test_kernels_compile_for_gpus() -> None:
    """In a process of its own: this one may run the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kvtransfer.compile_kernels"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    compiled = [
        f"{name} {capability} True" for capability in (80, 90) for name in ("copy_pieces", "sum_pieces")
    ]
    assert done.stdout.splitlines() == compiled
