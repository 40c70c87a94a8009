"""Layouts of weights: chosen by measured times, measured once a machine, without effect on the products."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.cpu.layout_choice import choose_linears
from engine.cpu.layout_times import measure_ways
from engine.cpu.layouts import BUCKETS, Band, Layout, Shape, Times, Way, always, choose, packed_up_to
from engine.cpu.linear import Linear, packed_linear, possible_ways

SHAPE = (256, 512)
COUNTS = {SHAPE: 4}
PACKED_WINS: Times = {rows: {Way.PACKED: 1.0, Way.ONEDNN: 2.0, Way.BLAS: 3.0} for rows in BUCKETS}
STORED_WINS: Times = {rows: {Way.PACKED: 2.0, Way.ONEDNN: 1.5, Way.BLAS: 1.0} for rows in BUCKETS}


def chosen_for(times: Times, others: int = 0) -> tuple[Band, ...]:
    """The bands of a shape among `others` weights of the same size that have no times."""
    return choose({SHAPE: times}, {SHAPE: 1, (SHAPE[0], SHAPE[1] + 1): others})[SHAPE]


def layouts_of(bands: Iterable[Band]) -> set[Layout]:
    return {band.way.layout for band in bands}


def test_the_fastest_way_is_taken() -> None:
    assert chosen_for(PACKED_WINS) == always(Way.PACKED)
    assert chosen_for(STORED_WINS) == always(Way.BLAS)


def test_ways_over_the_same_layout_change_with_the_rows() -> None:
    times = {1: {Way.BLAS: 1.0, Way.ONEDNN: 2.0}, 8: {Way.BLAS: 3.0, Way.ONEDNN: 2.0}}
    assert chosen_for(times) == (Band(2, Way.BLAS), Band(None, Way.ONEDNN))


def test_where_rows_are_multiplied_natively_only_the_packed_layout_counts() -> None:
    assert chosen_for(packed_up_to(STORED_WINS, 32)) == always(Way.PACKED)
    assert chosen_for(packed_up_to(STORED_WINS, 32), others=20) == (
        Band(128, Way.PACKED),
        Band(None, Way.BLAS),
    )
    assert packed_up_to({8: {Way.BLAS: 1.0}}, 32) == {8: {Way.BLAS: 1.0}}


def test_a_tie_goes_to_the_packed_layout() -> None:
    assert chosen_for({1: {Way.PACKED: 1.0, Way.ONEDNN: 0.97, Way.TRANSPOSED: 0.96}}) == always(Way.PACKED)


SPLIT: Times = {1: {Way.PACKED: 2.0, Way.ONEDNN: 1.0}, 8: {Way.PACKED: 1.0, Way.ONEDNN: 9.0}}


def test_a_second_layout_is_kept_where_it_saves_much_and_fits() -> None:
    assert chosen_for(SPLIT, others=20) == (Band(2, Way.ONEDNN), Band(None, Way.PACKED))


def test_no_second_layout_that_needs_more_than_a_tenth_of_the_weights() -> None:
    assert chosen_for(SPLIT, others=3) == always(Way.PACKED)


def test_no_second_layout_that_saves_little() -> None:
    times = {1: {Way.PACKED: 1.0, Way.ONEDNN: 0.85}, 8: {Way.PACKED: 1.0, Way.ONEDNN: 9.0}}
    assert chosen_for(times, others=1000) == always(Way.PACKED)


@given(
    times=st.dictionaries(
        st.sampled_from([(64 * size, 64) for size in range(1, 5)]),
        st.dictionaries(
            st.sampled_from(BUCKETS),
            st.dictionaries(st.sampled_from(Way), st.floats(1e-6, 1.0), min_size=1),
            min_size=1,
        ),
    ),
    counts=st.lists(st.integers(1, 30), min_size=4, max_size=4),
)
def test_bands_cover_all_rows_within_the_memory(
    times: dict[Shape, dict[int, dict[Way, float]]], counts: list[int]
) -> None:
    weights = {(64 * (index + 1), 64): count for index, count in enumerate(counts)}
    chosen = choose(times, weights)
    assert chosen.keys() == times.keys()
    extra = 0
    for (out, inner), bands in chosen.items():
        bounds = [band.most_rows for band in bands]
        assert bounds[-1] is None
        inner_bounds = [bound for bound in bounds[:-1] if bound is not None]
        assert len(inner_bounds) == len(bands) - 1
        assert inner_bounds == sorted(inner_bounds)
        extra += (len(layouts_of(bands)) - 1) * out * inner * weights[out, inner]
    assert extra <= 0.1 * sum(out * inner * count for (out, inner), count in weights.items())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_every_way_gives_the_same_product(dtype: torch.dtype, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype) if biased else None
    for rows in (1, 5, 40):
        given_rows = torch.randn(rows, 64, generator=generator).to(dtype)
        exact = given_rows.double() @ weight.double().t()
        exact = exact if bias is None else exact + bias.double()
        for way in possible_ways(weight):
            with torch.inference_mode():
                found = Linear(weight, bias, always(way))(given_rows)
            assert found.dtype == dtype
            torch.testing.assert_close(
                found.double(), exact, rtol=0.02, atol=0.2 if dtype.itemsize == 2 else 1e-4
            )


def test_rows_take_the_way_of_their_band() -> None:
    """Two ways over different values cannot be had from Linear, so the storage tells which one was taken."""
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    linear = Linear(weight, None, (Band(2, Way.BLAS), Band(None, Way.TRANSPOSED)))
    with torch.inference_mode():
        weight.zero_()
        few, many = linear(torch.ones(2, 32)), linear(torch.ones(3, 32))
    assert few.abs().sum() == 0, "the stored weight is shared, not copied"
    assert many.abs().sum() > 0, "the transposed weight is a copy"


def test_all_ways_are_measured_in_every_bucket() -> None:
    times = measure_ways([SHAPE], torch.float32)[SHAPE]
    assert tuple(times) == BUCKETS
    for found in times.values():
        assert found.keys() == set(possible_ways(torch.zeros(1, 1)))
        assert min(found.values()) > 0


def test_measuring_ends_in_time() -> None:
    """On a clock on which each product takes a second, nothing but the first products is begun."""
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += 0.5
        return now_s

    assert measure_ways([SHAPE, (512, 512)], torch.float32, limit_s=3.0, clock=clock) == {}


class Measured:
    """Stands in for the clock's part of the choice: gives known times and counts its calls."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self.asked: list[list[Shape]] = []

    def __call__(self, shapes: Iterable[Shape], dtype: torch.dtype) -> Mapping[Shape, Times]:
        """Measure."""
        self.asked.append(list(shapes))
        return dict.fromkeys(self.asked[-1], self.times)


def cache_file(cache: Path) -> Path:
    (found,) = (cache / "layouts").glob("*.json")
    return found


def test_a_second_process_measures_nothing(tmp_path: Path) -> None:
    first, second = Measured(STORED_WINS), Measured(PACKED_WINS)
    choose_linears(COUNTS, torch.float32, tmp_path, first)
    linear = choose_linears(COUNTS, torch.float32, tmp_path, second)
    assert (first.asked, second.asked) == ([[SHAPE]], [])
    weight = torch.ones(SHAPE)
    product = linear(weight, None)
    weight.zero_()
    assert product(torch.ones(1, SHAPE[1])).sum() == 0, "the cached choice is the stored layout"


def test_only_shapes_that_are_new_are_measured(tmp_path: Path) -> None:
    choose_linears(COUNTS, torch.float32, tmp_path, Measured(STORED_WINS))
    more = Measured(STORED_WINS)
    choose_linears({**COUNTS, (512, 512): 1}, torch.float32, tmp_path, more)
    assert more.asked == [[(512, 512)]]


def test_threads_and_dtype_have_times_of_their_own(tmp_path: Path) -> None:
    measured = Measured(STORED_WINS)
    choose_linears(COUNTS, torch.float32, tmp_path, measured)
    choose_linears(COUNTS, torch.bfloat16, tmp_path, measured)
    torch.set_num_threads(2)
    choose_linears(COUNTS, torch.float32, tmp_path, measured)
    assert len(measured.asked) == 3


def truncated(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def of_another_machine(path: Path) -> None:
    document = json.loads(path.read_text())
    document["measured_on"]["processor"] = "another"
    path.write_text(json.dumps(document))


def with_an_unknown_way(path: Path) -> None:
    path.write_text(path.read_text().replace("blas", "guess"))


def with_a_negative_time(path: Path) -> None:
    path.write_text(path.read_text().replace('"seconds":1.0', '"seconds":-1.0'))


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


def too_large(path: Path) -> None:
    path.write_text(path.read_text() + " " * 5_000_000)


@pytest.mark.parametrize(
    "spoil",
    [truncated, of_another_machine, with_an_unknown_way, with_a_negative_time, unreadable, too_large],
    ids=lambda spoil: spoil.__name__,
)
def test_a_file_that_cannot_be_trusted_is_measured_again(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    choose_linears(COUNTS, torch.float32, tmp_path, Measured(STORED_WINS))
    spoil(cache_file(tmp_path))
    again = Measured(PACKED_WINS)
    choose_linears(COUNTS, torch.float32, tmp_path, again)
    assert again.asked == [[SHAPE]]


def test_a_cache_that_cannot_be_written_costs_only_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "layouts").write_text("in the way")
    measured = Measured(PACKED_WINS)
    product = choose_linears(COUNTS, torch.float32, tmp_path, measured)(torch.ones(SHAPE), None)
    assert measured.asked == [[SHAPE]]
    assert torch.equal(product(torch.ones(1, SHAPE[1])), torch.full((1, SHAPE[0]), float(SHAPE[1])))


def test_what_was_not_measured_in_time_is_packed_and_measured_next_time(tmp_path: Path) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    rows = torch.ones(3, SHAPE[1])

    def nothing(shapes: Iterable[Shape], dtype: torch.dtype) -> Mapping[Shape, Times]:
        return {}

    product = choose_linears(COUNTS, torch.float32, tmp_path, nothing)(weight, None)
    expected: Tensor = packed_linear(weight, None)(rows)
    assert torch.equal(product(rows), expected)
    later = Measured(PACKED_WINS)
    choose_linears(COUNTS, torch.float32, tmp_path, later)
    assert later.asked == [[SHAPE]]


def test_small_weights_are_not_worth_measuring(tmp_path: Path) -> None:
    measured = Measured(PACKED_WINS)
    choose_linears({(32, 32): 4}, torch.float32, tmp_path, measured)
    assert measured.asked == []
    assert not (tmp_path / "layouts").exists()
