"""Edge: plan.yaml to plan: the simulator behind the search, refusals in one sentence, and a cluster.yaml."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config_file import parse_cluster_config
from planner.placements.goodput import Goodput, Probe, find_goodput
from planner.placements.mix import Mix
from planner.placements.placement import Candidate, Mode, WorkerKind
from planner.placements.search import bounded
from planner.placements.simulated_candidate import SimulatedCandidate
from planner.placements.space import candidates, worker_kinds
from planner.plan.cluster import cluster_yaml
from planner.plan.curves import plan_lines
from planner.plan.file import PlanFile
from planner.plan.plot import draw
from planner.plan.processes import PlanProcesses
from planner.plan.result import PlanResult
from planner.plan.run import Problem, make_plan, read_problem
from planner.yaml_document import load_section
from tandem.cli.main import EXIT_BAD_INPUT, main
from tandem.errors import ConfigError
from tests.planner.distserve_figures import PROFILE
from tests.planner.profiles import profile_document


def _document(**changes: Any) -> dict[str, Any]:
    """OPT-13B on one node of two A100, a quick search."""
    latency = {"kind": "distserve", "file": "distserve.json", "key": "facebook/opt-13b"}
    return {
        "model": "opt-13b",
        "hardware": [{"device": "a100-80g", "nodes": 1, "devices_per_node": 2, "latency": latency}],
        "workload": {
            "prompt_tokens": {"mean": 500, "variation": 0.5, "most": 1500},
            "output_tokens": {"mean": 50, "variation": 0.5, "most": 200},
            "requests": 100,
            "seconds": 0,
        },
        "slo": {"ttft_s": 0.3, "tpot_s": 0.1},
        "search": {"tp": [1], "pp": [1], "modes": ["disaggregated"], "tolerance": 0.05, "processes": 1},
    } | changes


def _written(folder: Path, document: dict[str, Any]) -> Path:
    (folder / "distserve.json").write_text(json.dumps(PROFILE))
    (folder / "profile.json").write_text(json.dumps(profile_document()))
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _problem(folder: Path, **changes: Any) -> Problem:
    return read_problem(load_section(_written(folder, _document(**changes)), PlanFile), folder)


def _planned(problem: Problem, folder: Path) -> PlanResult:
    with PlanProcesses(problem.plan, folder) as processes:
        return make_plan(problem, processes.find_many, lambda settled, total: None)


def test_a_plan_meets_the_objectives_in_the_simulator_and_not_at_a_rate_above(tmp_path: Path) -> None:
    problem = _problem(tmp_path)
    result = _planned(problem, tmp_path)
    best = result.ranked[0]
    with PlanProcesses(problem.plan, tmp_path) as processes:
        runs = [(best.candidate, rate, 0, 1.0) for rate in (best.rate_rps, 1.2 * best.rate_rps)]
        at, above = (reached.share for reached in processes.attainments(runs))
    assert at >= 0.9 > above
    assert "fails first, at" in best.why


def test_the_best_is_within_2_percent_of_simulating_every_candidate(tmp_path: Path) -> None:
    hardware = [_document()["hardware"][0] | {"devices_per_node": 3}]
    searching = {"tp": [1, 2], "pp": [1], "most_workers": 2, "tolerance": 0.01, "processes": 1}
    problem = _problem(tmp_path, hardware=hardware, search=searching)
    kinds = worker_kinds(problem.space, problem.workers, problem.buckets[0].longest_tokens)
    every = bounded(problem.space, problem.bounds(0), candidates(problem.space, kinds))
    simulate = SimulatedCandidate(problem)
    by_hand = [find_goodput(simulate, Probe(one.candidate, one.bound_rps), 0.9, 0.01) for one in every]
    best = max(found.rate_rps / one.cost for found, one in zip(by_hand, every, strict=True))
    planned = _planned(problem, tmp_path)
    assert planned.simulated < len(every)
    assert planned.ranked[0].per_price >= 0.98 * best


def test_a_run_that_cannot_pass_any_more_ends_early_and_changes_no_answer(tmp_path: Path) -> None:
    problem = _problem(tmp_path, workload=_document()["workload"] | {"requests": 400})
    kinds = worker_kinds(problem.space, problem.workers, problem.buckets[0].longest_tokens)
    whole, shortened = SimulatedCandidate(problem), SimulatedCandidate(problem, only_whether=True)
    for one in bounded(problem.space, problem.bounds(0), candidates(problem.space, kinds)):
        probe = Probe(one.candidate, one.bound_rps)
        found = [find_goodput(evaluate, probe, 0.9, 0.05) for evaluate in (whole, shortened)]
        assert (found[0].rate_rps, found[0].runs) == (found[1].rate_rps, found[1].runs)
        assert found[0].binding == found[1].binding
        overloaded = [evaluate(one.candidate, 2 * one.bound_rps) for evaluate in (whole, shortened)]
        assert overloaded[1].share < 0.9
        assert overloaded[1].offered < overloaded[0].offered


def test_processes_of_their_own_answer_as_this_one_does(tmp_path: Path) -> None:
    problem = _problem(tmp_path)
    two = PlanFile.model_validate(
        problem.plan.model_dump() | {"search": {**problem.plan.search.model_dump(), "processes": 2}}
    )
    assert _planned(read_problem(two, tmp_path), tmp_path) == _planned(problem, tmp_path)


def test_the_cluster_yaml_is_one_that_tandem_up_accepts(tmp_path: Path) -> None:
    problem = _problem(tmp_path)
    mix = _planned(problem, tmp_path).mix
    workers = problem.workers
    text = cluster_yaml(problem.plan, mix, workers, workers.model.kv_bytes_per_token, "models/opt-13b")
    config = parse_cluster_config(text, "planned")
    (candidate, count), *rest = mix.counts
    assert not rest
    assert config.pools.prefill.replicas == count * candidate.prefill_workers
    assert config.pools.decode.replicas == count * candidate.decode_workers
    assert config.pools.decode.memory == workers.kv_tokens(candidate.prefill) * 819_200
    assert config.slo_classes[config.default_slo_class].ttft_s == 0.3


def test_kv_moves_early_in_the_cluster_as_it_did_in_the_plan(tmp_path: Path) -> None:
    problem = _problem(tmp_path)
    kind = WorkerKind("a100-80g")
    mix = Mix(((Candidate(Mode.DISAGGREGATED, kind, 1, kind, 1), 1),), 1.0, 2.0)
    found = [
        parse_cluster_config(cluster_yaml(plan, mix, problem.workers, 819_200, "m"), "planned")
        for plan in (problem.plan, problem.plan.model_copy(update={"overlap_min_tokens": 1024}))
    ]
    assert [config.pools.prefill.overlap_min_tokens for config in found] == [256, 1024]


def test_a_mix_that_tandem_up_cannot_run_is_refused(tmp_path: Path) -> None:
    problem = _problem(tmp_path)
    candidate = _planned(problem, tmp_path).ranked[0].candidate
    colocated = type(candidate)(Mode.COLOCATED, candidate.prefill, 1)
    for mix in (Mix(((colocated, 2),), 1.0, 2.0), Mix(((candidate, 1), (colocated, 1)), 1.0, 3.0)):
        with pytest.raises(ConfigError, match="can't run this plan"):
            cluster_yaml(problem.plan, mix, problem.workers, 819_200, "m")


def test_the_plot_is_written(tmp_path: Path) -> None:
    problem = _problem(tmp_path)
    result = _planned(problem, tmp_path)
    with PlanProcesses(problem.plan, tmp_path) as processes:
        lines = plan_lines(result, processes.attainments)
    draw(lines, 0.9, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    shares = [share for _, share in lines[0].by_rate]
    assert shares[0] >= 0.9 > shares[-1]
    with pytest.raises(ConfigError, match="can't be written"):
        draw(lines, 0.9, tmp_path / "plan.nosuchformat")


def test_a_measured_machine_can_be_planned_for(tmp_path: Path) -> None:
    latency = {"kind": "profile", "file": "profile.json"}
    hardware = [{"device": "cpu-2-cores", "nodes": 1, "devices_per_node": 2, "latency": latency}]
    problem = _problem(tmp_path, model="smollm2", hardware=hardware, slo={"ttft_s": 2.0, "tpot_s": 0.2})
    result = _planned(problem, tmp_path)
    assert result.ranked[0].rate_rps > 0
    text = cluster_yaml(problem.plan, result.mix, problem.workers, 46_080, "smollm2")
    assert parse_cluster_config(text, "planned").pools.prefill.device == "cpu"


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "impossible time to first token": (
        {"slo": {"ttft_s": 0.001, "tpot_s": 0.1}},
        "even idle, the quickest worker",
    ),
    "impossible time per token": ({"slo": {"ttft_s": 0.3, "tpot_s": 0.001}}, "takes 0.02"),
    "model that fits nowhere": (
        {
            "model": "opt-66b",
            "hardware": [{"device": "l4", "nodes": 1, "devices_per_node": 2}],
        },
        "opt-66b fits nowhere: weights and the KV",
    ),
    "no step times": ({"search": {"tp": [4], "pp": [1]}}, "opt-13b has no step times"),
    "negative rate": ({"rate_rps": -1.0}, "rate_rps: Input should be greater than 0"),
    "rate beyond the fleet": ({"rate_rps": 1000.0}, "more than these 2 devices bear"),
    "unknown device": (
        {"hardware": [{"device": "b900", "nodes": 1, "devices_per_node": 1}]},
        "known: a100-80g",
    ),
    "unknown model": ({"model": "gpt-9"}, "no model is called 'gpt-9'"),
    "unknown key": ({"colour": "blue"}, "colour"),
    "no workload": ({"workload": {"requests": 100}}, "give either trace"),
    "missing trace": ({"workload": {"trace": "none.csv"}}, "none.csv"),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_bad_input_is_one_sentence_and_exit_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, expected = REFUSALS[name]
    path = _written(tmp_path, _document(**changes))
    if "search" in changes:
        path = _written(tmp_path, _document(search=_document()["search"] | changes["search"]))
    assert main(["plan", "-f", str(path)]) == EXIT_BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    assert expected in said.err
    assert said.err.count("\n") == 1


def test_a_table_that_is_none_of_operators_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ops.csv").write_text("a,b\n1,2\n")
    latency = {"kind": "operators", "file": "ops.csv"}
    hardware = [{"device": "a100-80g", "nodes": 1, "devices_per_node": 2, "latency": latency}]
    assert main(["plan", "-f", str(_written(tmp_path, _document(hardware=hardware)))]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "not a table of operators" in error
    assert error.count("\n") == 1


def test_an_empty_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.csv").write_text("num_prefill_tokens,num_decode_tokens\n")
    path = _written(tmp_path, _document(workload={"trace": "empty.csv"}))
    assert main(["plan", "-f", str(path)]) == EXIT_BAD_INPUT
    assert "is empty" in capsys.readouterr().err


def test_an_unsorted_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n5,9,9\n2,9,9\n")
    path = _written(tmp_path, _document(workload={"trace": "t.csv"}))
    assert main(["plan", "-f", str(path)]) == EXIT_BAD_INPUT
    assert "not sorted: request 2 comes at 2 s" in capsys.readouterr().err


def test_the_request_log_is_a_trace(tmp_path: Path) -> None:
    lines = [f'{{"arrival_s": {at}, "prompt_tokens": {100 + at}, "output_tokens": 7}}' for at in (3, 1)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    problem = _problem(tmp_path, workload={"trace": "log.jsonl"})
    assert problem.buckets[0].pairs == ((101, 7), (103, 7))


def test_the_command_prints_json_and_writes_the_cluster_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _written(tmp_path, _document())
    assert main(["plan", "-f", str(path), "--json", "-o", str(tmp_path / "cluster.yaml")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["placement"][0]["count"] >= 1
    assert said["ranked"][0]["goodput_rps"] > 0
    assert parse_cluster_config((tmp_path / "cluster.yaml").read_text(), "planned").pools.decode.replicas == 1


def test_the_command_prints_a_ranked_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-f", str(_written(tmp_path, _document()))]) == 0
    said = capsys.readouterr().out
    assert "1 x prefill (a100-80g tp1 pp1) + 1 x decode" in said
    assert "held back by" in said
    assert "fails first, at" in said


def test_buckets_may_be_served_by_devices_of_their_own(tmp_path: Path) -> None:
    workload = _document()["workload"] | {"buckets": 2}
    problem = _problem(tmp_path, workload=workload)
    assert [len(bucket.pairs) for bucket in problem.buckets] == [50, 50]
    found: list[Goodput] = []

    def find_many(probes: Sequence[Probe]) -> list[Goodput]:
        answers = [Goodput(one.candidate, 10.0 if one.bucket == 0 else 5.0, one.bucket) for one in probes]
        found.extend(answers)
        return answers

    result = make_plan(problem, find_many, lambda settled, total: None)
    assert {one.bucket for one in found} == {0, 1}
    assert result.mix.rate_rps == pytest.approx(1 / (0.5 / 10 + 0.5 / 5))
