"""Wire codecs give back what was written, within the error that each of them promises."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtransfer.codecs.contract import BlockShape, Codec, grouped
from kvtransfer.codecs.outlier import OutlierCodec
from kvtransfer.codecs.registry import CODECS, codec_named
from kvtransfer.codecs.scaled import fp8_codec, int8_codec
from kvtransfer.codecs.thresholds import Thresholds, calibrate
from tandem.errors import ConfigError

SHAPES = [
    BlockShape(layers=3, block_size=16, kv_heads=2, head_dim=64, dtype=torch.float32),
    BlockShape(layers=1, block_size=4, kv_heads=1, head_dim=8, dtype=torch.bfloat16),
    BlockShape(layers=2, block_size=16, kv_heads=3, head_dim=64, dtype=torch.float16),
]
torch.set_num_threads(1)
BFLOAT16_ROUNDING = 2**-8
SMALLEST_FLOAT16 = 2**-24


def blocks_of(shape: BlockShape, seed: int, spread: float = 1.0, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn((count, *shape.dimensions), generator=generator) * spread
    return numbers.to(shape.dtype)


def round_trip(codec: Codec, blocks: Tensor) -> Tensor:
    encoded = torch.full((blocks.shape[0], codec.encoded_bytes), 0xA5, dtype=torch.uint8)
    codec.encode(blocks, encoded)
    decoded = torch.full_like(blocks, float("nan"))
    codec.decode(encoded, decoded)
    return decoded


def largest(shape: BlockShape, blocks: Tensor) -> Tensor:
    """Largest magnitude of each group, [n, groups, 1]."""
    return grouped(blocks, shape).abs().amax(dim=2, keepdim=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_identity_gives_back_the_very_bits(shape: BlockShape) -> None:
    blocks = blocks_of(shape, 1)
    assert torch.equal(round_trip(codec_named("identity", shape), blocks), blocks)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-3, 1.0, 300.0]))
def test_int8_errs_by_half_a_step_of_its_group(shape: BlockShape, seed: int, spread: float) -> None:
    blocks = blocks_of(shape, seed, spread)
    error = grouped(round_trip(int8_codec(shape), blocks), shape) - grouped(blocks, shape)
    bound = largest(shape, blocks) * (0.5 / 127 + BFLOAT16_ROUNDING) * 1.001
    assert bool((error.abs() <= bound).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-3, 1.0, 300.0]))
def test_fp8_errs_by_a_sixteenth_of_the_number(shape: BlockShape, seed: int, spread: float) -> None:
    blocks = blocks_of(shape, seed, spread)
    exact = grouped(blocks, shape)
    error = grouped(round_trip(fp8_codec(shape), blocks), shape) - exact
    smallest_step = largest(shape, blocks) / 448 * 2**-9 + SMALLEST_FLOAT16
    bound = exact.abs() * (2**-4 + BFLOAT16_ROUNDING) + smallest_step
    assert bool((error.abs() <= bound * 1.001).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), outlier=st.sampled_from([0.0, 8.0, 1000.0]))
def test_the_outlier_codec_keeps_its_middle_narrow(shape: BlockShape, seed: int, outlier: float) -> None:
    """One wild number in a group costs the others nothing, unlike with a scale for all."""
    blocks = blocks_of(shape, seed)
    codec = OutlierCodec(shape, calibrate(blocks_of(shape, 0, count=32), shape))
    blocks[:, :, :, 1, :, 3] += outlier
    exact = grouped(blocks, shape)
    error = (grouped(round_trip(codec, blocks), shape) - exact).abs()
    wild = exact.abs() > 6
    assert bool((error[wild] <= exact[wild].abs() * (2**-11 + BFLOAT16_ROUNDING)).all())
    # Half a step of the widest middle, or an inner number that found no room among the outliers.
    assert float(error[~wild].max()) <= 6.0 / 7 / 2 + 0.1


def test_the_outlier_codec_is_exact_to_sixteen_bits_where_numbers_are_outer() -> None:
    shape = SHAPES[0]
    codec = OutlierCodec(shape, calibrate(blocks_of(shape, 0, count=32), shape))
    blocks = torch.zeros((1, *shape.dimensions))
    blocks[0, :, :, :4, :, 0] = 77.7
    decoded = round_trip(codec, blocks)
    assert torch.allclose(decoded[0, :, :, :4, :, 0], torch.tensor(77.7), rtol=2**-11)


@pytest.mark.parametrize("name", [name for name in CODECS if name not in ("identity", "oaken")])
def test_zeros_stay_zeros(name: str) -> None:
    blocks = torch.zeros((2, *SHAPES[0].dimensions))
    assert torch.equal(round_trip(codec_named(name, SHAPES[0]), blocks), blocks)


def test_encoded_sizes() -> None:
    """Of 16 x 64 numbers: one byte each and a scale; or half a byte, a bit map, a sixteenth in 16 bits."""
    shape = SHAPES[0]
    thresholds = calibrate(blocks_of(shape, 0), shape)
    assert int8_codec(shape).encoded_bytes == shape.groups * (1024 + 4)
    assert fp8_codec(shape).encoded_bytes == shape.groups * (1024 + 4)
    assert OutlierCodec(shape, thresholds).encoded_bytes == shape.groups * (8 + 128 + 128 + 512)
    assert codec_named("identity", shape).encoded_bytes == shape.block_bytes == shape.groups * 4096


def test_thresholds_survive_their_file(tmp_path: Path) -> None:
    shape = SHAPES[0]
    thresholds = calibrate(blocks_of(shape, 0), shape)
    thresholds.save(tmp_path / "thresholds.json")
    read = Thresholds.load(tmp_path / "thresholds.json", shape)
    assert torch.equal(read.values, thresholds.values)
    assert read.digest == thresholds.digest


def test_calibration_puts_the_given_fractions_outside() -> None:
    shape = SHAPES[0]
    blocks = blocks_of(shape, 0, count=32)
    low, inner_low, inner_high, high = calibrate(blocks, shape).values[:, :, None].unbind(1)
    numbers = grouped(blocks, shape)
    outer = ((numbers > high) | (numbers < low)).float().mean()
    inner = ((numbers < inner_high) & (numbers > inner_low)).float().mean()
    assert float(outer) == pytest.approx(0.03, abs=0.002)
    assert float(inner) == pytest.approx(0.03, abs=0.002)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a file of KV thresholds"),
        ("{", "not a file of KV thresholds"),
        ('{"groups": [[0, 0, 0, 0]]}', "the model needs (12, 4)"),
        ('{"groups": [' + ",".join(["[1, 0, 0, 0]"] * 12) + "]}", "ascend"),
        ('{"groups": [' + ",".join(["[0, 0, 0, NaN]"] * 12) + "]}", "finite"),
    ],
)
def test_a_wrong_thresholds_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "thresholds.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as refusal:
        Thresholds.load(path, SHAPES[0])
    assert message in str(refusal.value)


def test_an_unknown_codec_is_refused_with_the_names_that_are_known() -> None:
    with pytest.raises(ConfigError, match="identity, fp8, int8, oaken"):
        codec_named("zip", SHAPES[0])


def test_the_outlier_codec_asks_for_its_thresholds() -> None:
    with pytest.raises(ConfigError, match="calibration"):
        codec_named("oaken", SHAPES[0])
