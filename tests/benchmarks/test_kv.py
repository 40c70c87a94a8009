"""`tandem bench kv`: real pulls between two processes, and rates that follow from the times."""

import itertools

import pytest

from benchmarks.kv import result_json
from benchmarks.kv_codec_rates import codec_rates
from benchmarks.kv_handoffs import HANDOFF, measured_handoffs
from benchmarks.kv_layouts import (
    SINK_STEP,
    SMALL_BLOCKS,
    SMOLLM2_BLOCKS,
    SOURCE_STEP,
    Layout,
    Placement,
    layouts,
)
from benchmarks.kv_pulls import measured
from benchmarks.kv_report import text
from benchmarks.kv_times import CaseTimes, HandoffTimes, OverlapFigures, Road, Timed
from kvtransfer.contract import PullReport


def test_blocks_have_the_sizes_of_the_table() -> None:
    assert (SMALL_BLOCKS.block_bytes, SMOLLM2_BLOCKS.block_bytes) == (24 * 1024, 737_280)
    largest = max(layouts(quick=False)[0].counts) * layouts(quick=False)[0].shape.block_bytes
    assert largest == 256 * 1024 * 1024


@pytest.mark.parametrize("layout", layouts(quick=False), ids=lambda layout: layout.placement.value)
@pytest.mark.parametrize("step", [SOURCE_STEP, SINK_STEP])
def test_blocks_differ_and_scattered_ones_form_no_runs(layout: Layout, step: int) -> None:
    blocks = layout.blocks(max(layout.counts), step)
    assert len(set(blocks)) == len(blocks)
    assert max(blocks) < layout.pool_blocks
    in_a_row = sum(after - before == 1 for before, after in itertools.pairwise(blocks))
    assert in_a_row == (len(blocks) - 1 if layout.placement is Placement.CONTIGUOUS else 0)


NO_HANDOFFS = HandoffTimes(HANDOFF, 2, {})


def test_rates_are_medians_beside_the_limit_of_the_same_rounds() -> None:
    pulls = tuple(
        Timed(
            PullReport("shm", 98_304, 1, 0.001, 0.0, 0.0, copy_s + 0.002, copy_s, 0.001, 0.003),
            pull_s=copy_s + 0.007,
            reserve_s=0.001,
        )
        for copy_s in (0.004, 0.001, 0.002)
    )
    layout = Layout(SMALL_BLOCKS, Placement.SCATTERED, (4,))
    case = CaseTimes(layout, 4, (0.001, 0.0005, 0.002), (0.01,), (0.003,), {Road("shm", True): pulls})
    handoffs = HandoffTimes(layout, 2, {Road("shm", True): pulls})
    result = result_json([case], 3, handoffs, [], None)
    (road,) = result["cases"][0]["roads"]
    assert road["gbps"] == pytest.approx(98_304 / 0.002 / 1e9)
    assert (road["limit"], road["ratio"]) == ("memcpy", pytest.approx(0.5))
    assert result["cases"][0]["hash_gbps"] == pytest.approx(98_304 / 0.003 / 1e9)
    (parts,) = result["handoff"]["roads"]
    assert result["handoff"]["moved_bytes"] == 98_304
    rates = 98_304 / 0.004 / 1e9, 98_304 / 0.009 / 1e9
    assert (road["move_gbps"], road["pull_gbps"]) == pytest.approx(rates)
    assert (parts["copy_p50_ms"], parts["move_p50_ms"], parts["reserve_p50_ms"]) == pytest.approx((2, 4, 1))
    assert parts["beyond_bytes_p90_ms"] == pytest.approx(8.0)
    assert parts["pull_p90_ms"] == pytest.approx(10.6)


def test_the_overlap_is_told_in_milliseconds_and_left_out_when_it_was_not_measured() -> None:
    case = CaseTimes(Layout(SMALL_BLOCKS, Placement.SCATTERED, (4,)), 4, (0.001,), (0.01,), (0.01,), {})
    figures = OverlapFigures("fp8", 1200, 125e6, 55_296_000, 3, 0.442, 2.0, 2.1, 0.480, 0.012, 0.025)
    told = result_json([case], 3, NO_HANDOFFS, [], figures)
    assert told["overlap"]["landed_overlapped_ms"] == pytest.approx(12.0)
    assert told["overlap"]["link_gbps"] == pytest.approx(0.125)
    assert told["overlap"]["codec"] == "fp8"
    assert "12.0 ms when it moves while the prompt is read, 480.0 ms afterwards: 2.5%" in text(told)
    untold = result_json([case], 3, NO_HANDOFFS, [], None)
    assert untold["overlap"] is None
    assert "afterwards" not in text(untold)


async def test_pulls_go_between_two_processes() -> None:
    roads = [Road("shm", True), Road("tcp", False)]
    (case,) = await measured(Layout(SMALL_BLOCKS, Placement.SCATTERED, (3,)), roads, rounds=2)
    assert list(case.roads) == roads
    for road, pulls in case.roads.items():
        assert [pull.report.transport for pull in pulls] == [road.transport] * 2
        assert [pull.report.moved_bytes for pull in pulls] == [3 * 24_576] * 2
        assert all(pull.pull_s >= pull.report.move_s > 0 for pull in pulls)
    assert [len(times) for times in (case.memcpy_s, case.raw_tcp_s, case.hash_s)] == [2, 2, 2]


def test_every_codec_is_told_with_what_it_saves_and_costs() -> None:
    identity, *coded = codec_rates(rounds=1)
    assert (identity.codec, identity.ratio, identity.max_error) == ("identity", 1.0, 0.0)
    assert [rates.codec for rates in coded] == ["fp8", "int8", "oaken"]
    for rates in coded:
        assert rates.ratio == rates.encoded_bytes / rates.block_bytes < 0.3
        assert 0 < rates.mean_error < rates.max_error < 0.5
        assert min(rates.encode_gbps, rates.decode_gbps) > 0


async def test_handoffs_are_made_as_a_decode_worker_makes_them() -> None:
    times = await measured_handoffs([Road("shm", True), Road("tcp", True)], pulls=2)
    for road, handoffs in times.roads.items():
        assert [handoff.report.transport for handoff in handoffs] == [road.transport] * 2
        assert [handoff.report.moved_bytes for handoff in handoffs] == [7_372_800] * 2
        assert all(
            handoff.reserve_s > 0 and handoff.beyond_bytes_s > handoff.reserve_s for handoff in handoffs
        )
