"""Pure: rows that were left out of the tables are forecast from those beside them."""

from collections.abc import Iterator, Mapping
from statistics import median

import pytest

from planner.latency import PromptPart, StepShape
from planner.step_times.hardware import device_named
from planner.step_times.model_shape import model_named
from planner.step_times.operator_tables import (
    LAYER_OPS,
    ComposedModel,
    OperatorTable,
    collective_link,
    degrees,
)
from planner.step_times.roofline import Layout, Roofline
from planner.step_times.transfer_links import LinkTable
from tandem.errors import ConfigError
from tests.planner.operator_rows import ROWS
from tests.planner.shared_data import csv_rows

LEFT_OUT_EVERY = 5
TABLES = [f"{device}_Llama-2-{size}-hf" for device in ("a100", "h100") for size in ("7b", "70b")]


def _split(rows: list[dict[str, str]], column: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows kept and rows held out: every fifth size, never the first or the last."""
    sizes = sorted({int(row[column]) for row in rows})
    held = set(sizes[2:-1:LEFT_OUT_EVERY])
    return [r for r in rows if int(r[column]) not in held], [r for r in rows if int(r[column]) in held]


def _errors(table: OperatorTable, held: list[dict[str, str]]) -> Iterator[float]:
    for row in held:
        for op in LAYER_OPS:
            measured_s = float(row[f"time_stats.{op}.median"]) / 1e3
            yield abs(table.op_s(op, int(row["num_tokens"])) / measured_s - 1)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", TABLES)
def test_held_out_rows_of_linear_ops_are_within_5_percent(name: str, tp: int) -> None:
    rows = [
        row
        for row in csv_rows(f"profiles/vidur/{name}_linear_ops.csv")
        if row["num_tensor_parallel_workers"] == str(tp)
    ]
    kept, held = _split(rows, "num_tokens")
    table = OperatorTable(kept, tp)
    assert len(held) > 40
    assert median(_errors(table, held)) < 0.05


def _collective_error(rows: list[dict[str, str]], collective: str, workers: int, in_node: int) -> float:
    of_kind = [
        row for row in rows if (row["num_workers"], row["devices_per_node"]) == (str(workers), str(in_node))
    ]
    kept, held = _split(of_kind, "size")
    link = collective_link(kept, collective, workers, in_node)
    column = f"time_stats.{collective}.median"
    return median(abs(link.seconds(float(r["size"])) / (float(r[column]) / 1e3) - 1) for r in held)


@pytest.mark.parametrize("device", ["a100", "h100"])
@pytest.mark.parametrize(
    ("collective", "workers", "in_node"),
    [
        ("send_recv", 2, 1),
        ("send_recv", 2, 2),
        ("all_reduce", 2, 2),
        ("all_reduce", 4, 4),
        ("all_reduce", 8, 8),
    ],
)
def test_held_out_rows_of_links_are_within_5_percent(
    device: str, collective: str, workers: int, in_node: int
) -> None:
    rows = list(csv_rows(f"profiles/vidur/{device}_dgx_{collective}.csv"))
    assert _collective_error(rows, collective, workers, in_node) < 0.05


def test_a_step_is_all_layers_attention_and_the_output_matrix() -> None:
    shape = model_named("llama-2-7b")
    layout = Layout(device_named("a100-80g"))
    composed = ComposedModel(shape, layout, OperatorTable(ROWS, 1))
    layer_ms = 0.105 + 1.911 + 0.149 + 0.611 + 0.104 + 3.366 + 0.266 + 1.604 + 2 * 0.055
    without_attention_s = (32 * layer_ms + 0.234) / 1e3
    step_s = composed.step_s(StepShape((PromptPart(4096),)))
    attention_s = 32 * 4 * 4096**2 / 2 * 4096 / layout.reached_flops_s
    head_s = 4096 * 32000 * 2 / layout.reached_bytes_s
    assert step_s == pytest.approx(without_attention_s + attention_s + head_s, rel=1e-3)


def test_roofline_and_tables_agree_on_long_prompts() -> None:
    """Both describe the same A100; element-wise ops, which the roofline lacks, are what differs."""
    shape, layout = model_named("llama-2-7b"), Layout(device_named("a100-80g"))
    step = StepShape((PromptPart(4096),))
    measured_s = ComposedModel(shape, layout, OperatorTable(ROWS, 1)).step_s(step)
    assert Roofline(shape, layout).step_s(step) == pytest.approx(measured_s, rel=0.15)


def test_parallelism_without_its_links_is_refused() -> None:
    shape, table = model_named("llama-2-7b"), OperatorTable(ROWS, 1)
    with pytest.raises(ConfigError, match="all-reduces"):
        ComposedModel(shape, Layout(device_named("a100-80g"), 2), table)
    with pytest.raises(ConfigError, match="between stages"):
        ComposedModel(shape, Layout(device_named("a100-80g"), 1, 2), table, LinkTable([(1, 1)]))
    with pytest.raises(ConfigError, match="no rows for tp 4"):
        OperatorTable(ROWS, 4)


@pytest.mark.parametrize(
    "rows",
    [
        [{"num_tokens": "1"}],
        [{**ROWS[0], "num_tokens": "many"}],
        [{**ROWS[0], "time_stats.emb.median": "nan"}],
        [{**ROWS[0], "time_stats.add.median": "-1"}],
    ],
)
def test_another_table_is_refused(rows: list[Mapping[str, str]]) -> None:
    with pytest.raises(ConfigError, match="not a table of operators"):
        OperatorTable(rows, 1)
    with pytest.raises(ConfigError, match="not a table of all_reduce"):
        collective_link(rows, "all_reduce", 2, 2)


def test_a_table_says_for_which_degrees_it_has_rows() -> None:
    assert degrees(ROWS) == {1}
    with pytest.raises(ConfigError, match="not a table of operators"):
        degrees([{"a": "1"}])
