"""Edge: `tandem simulate`: what it prints and writes, and one sentence for each bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.cli.main import EXIT_BAD_INPUT, main

GOOD: dict[str, Any] = {
    "model": "opt-13b",
    "hardware": [{"device": "a100-80g", "nodes": 1, "devices_per_node": 8}],
    "workers": [
        {"role": "prefill", "device": "a100-80g", "count": 1},
        {"role": "decode", "device": "a100-80g", "count": 1},
    ],
    "workload": {"prompt_tokens": 300, "output_tokens": 20, "rate_rps": 2.0, "requests": 50},
    "classes": [{"name": "chat", "ttft_s": 1.0, "tpot_s": 0.1}],
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "sim.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return path


def test_figures_records_timeline_and_plot_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, timeline, plot = tmp_path / "r.csv", tmp_path / "t.json", tmp_path / "p.png"
    outputs = ["--records", str(records), "--timeline", str(timeline), "--plot", str(plot), "--json"]
    assert main(["simulate", "-f", str(written(tmp_path)), *outputs]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["requests"], figures["finished"]) == (50, 50)
    assert figures["classes"][0]["attainment_low"] <= figures["classes"][0]["attainment"]
    assert len(records.read_text().splitlines()) == 51
    names = {event["name"] for event in json.loads(timeline.read_text())["traceEvents"]}
    assert {"prefill", "decode"} <= names
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_same_file_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    printed = []
    for _ in range(2):
        assert main(["simulate", "-f", str(path), "--json"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_hops_and_early_fetch_of_the_file_are_simulated(tmp_path: Path) -> None:
    def times(name: str, **changes: Any) -> list[float]:
        records = tmp_path / "r.csv"
        path = written(tmp_path, workload=GOOD["workload"] | {"arrivals": "fixed"}, **changes)
        assert main(["simulate", "-f", str(path), "--records", str(records)]) == 0
        header, *rows = records.read_text().splitlines()
        return [float(row.split(",")[header.split(",").index(name)]) for row in rows]

    hops = {"front_door_s": 0.25, "to_worker_s": 0.125, "to_router_s": 0.0625}
    far = [near_s + 0.4375 for near_s in times("ttft_s")]
    assert times("ttft_s", hops=hops) == pytest.approx(far)
    assert times("handoff_s", overlap_min_tokens=256)[0] < times("handoff_s")[0]


def test_a_trace_keeps_its_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,10,3\n9,20,3\n")
    path = written(tmp_path, workload={"trace": "t.csv", "arrivals": "trace"})
    assert main(["simulate", "-f", str(path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["requests"] == 2
    assert 9.0 < figures["span_s"] < 10.0


@pytest.mark.parametrize(
    ("changes", "trace", "says"),
    [
        ({"workload": {"trace": "t.csv", "arrivals": "trace"}}, "", "empty|no column"),
        (
            {"workload": {"trace": "t.csv", "arrivals": "trace"}},
            "arrived_at,num_prefill_tokens,num_decode_tokens\n5,1,1\n2,1,1\n",
            "not sorted",
        ),
        (
            {"workload": {"prompt_tokens": 9, "output_tokens": 9, "rate_rps": -2}},
            "",
            "rate_rps: Input should be greater than 0",
        ),
        ({"workload": {"prompt_tokens": 9, "output_tokens": 9}}, "", "need rate_rps"),
        ({"workers": [{"role": "prefill", "device": "a100-80g"}]}, "", "no decode worker"),
        ({"workers": [{"role": "prefill", "device": "abacus"}]}, "", "not under hardware"),
        ({"model": "opt-66b"}, "", "does not fit"),
        ({"classes": []}, "", "classes"),
        ({"sped": 3}, "", "sped"),
        ({"faults": [{"at_s": 1, "kind": "death", "worker": "nobody"}]}, "", "names no worker"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    changes: dict[str, Any],
    trace: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "t.csv").write_text(trace)
    assert main(["simulate", "-f", str(written(tmp_path, **changes))]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert any(part in error for part in says.split("|")), error
    assert len(error.strip().splitlines()) == 1
