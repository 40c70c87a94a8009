"""Edge: `tandem plan --replay`: a controller's log decided anew with the workers of a plan."""

from pathlib import Path

import pytest

from planner.control.controller import Controller, ControllerRules
from planner.control.load_window import LoadWindow, RolePlacement
from planner.control.log import entry_line, head_line
from planner.control.replay import plan_capacity
from planner.plan.file import PlanFile
from planner.plan.run import read_problem
from planner.yaml_document import load_section
from tandem.cli.main import main

PLAN = """
model: opt-13b
hardware:
  - {device: a100-80g, nodes: 1, devices_per_node: 4}
workload:
  prompt_tokens: {mean: 700}
  output_tokens: {mean: 200}
slo: {ttft_s: 1.0, tpot_s: 0.1, attainment: 0.9}
"""


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


def logged(plan_file: Path, rate_rps: float) -> list[bytes]:
    rules = ControllerRules(fewest=2, most=4)
    plan = load_section(plan_file, PlanFile)
    controller = Controller(rules, plan_capacity(read_problem(plan, plan_file.parent)))
    lines = [head_line(rules)]
    for number in range(3):
        window = LoadWindow(
            *(60.0 * number, 60.0 * number + 60.0, round(60 * rate_rps), ((1800, 20),), 0.4, 0.99, 0.5),
            RolePlacement(1, 3),
        )
        lines.append(entry_line(window, controller.decide(window)))
    return lines


def test_an_equal_replay_ends_with_0_and_shows_the_changes(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "controller.jsonl"
    log.write_bytes(b"".join(logged(plan_file, 8.0)))
    assert main(["plan", "-f", str(plan_file), "--replay", str(log)]) == 0
    shown = capsys.readouterr().out
    assert main(["controller", "replay", str(log), "-f", str(plan_file)]) == 0
    assert capsys.readouterr().out == shown
    assert "line 3: flip decode to prefill" in shown
    assert "3 windows, 0 decided otherwise than logged" in shown


def test_another_decision_ends_with_1(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = logged(plan_file, 8.0)
    lines[2] = lines[2].replace(b'"decode":1', b'"decode":2')
    log = tmp_path / "controller.jsonl"
    log.write_bytes(b"".join(lines))
    assert main(["plan", "-f", str(plan_file), "--replay", str(log)]) == 1
    assert "the log says" in capsys.readouterr().out


def test_a_missing_log_ends_with_2(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-f", str(plan_file), "--replay", "/nonexistent.jsonl"]) == 2
    assert "/nonexistent.jsonl: cannot be read" in capsys.readouterr().err


SIM = """
model: opt-13b
hardware:
  - {device: a100-80g, nodes: 1, devices_per_node: 4}
workers:
  - {role: prefill, device: a100-80g, count: 1}
  - {role: decode, device: a100-80g, count: 3}
workload: {prompt_tokens: 1800, output_tokens: 20, rate_rps: 6.0, requests: 1500}
classes: [{name: chat, ttft_s: 1.0, tpot_s: 0.1}]
"""


def test_the_log_of_a_simulated_controller_is_replayed_with_the_plan(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, sim_file = tmp_path / "controller.jsonl", tmp_path / "sim.yaml"
    sim_file.write_text(SIM)
    assert main(["simulate", "-f", str(sim_file), "--controller", str(log), "--window", "30"]) == 0
    assert "flip decode to prefill" in capsys.readouterr().err
    assert main(["plan", "-f", str(plan_file), "--replay", str(log)]) == 0


def test_workers_of_two_kinds_cannot_be_flipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sim_file = tmp_path / "sim.yaml"
    sim_file.write_text(
        SIM.replace("role: decode, device: a100-80g", "role: decode, device: a100-80g, tp: 2")
    )
    log = str(tmp_path / "log.jsonl")
    assert main(["simulate", "-f", str(sim_file), "--controller", log]) == 2
    assert "all workers must be of one kind" in capsys.readouterr().err
