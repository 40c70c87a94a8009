"""Edge: DistServe's own evaluation (OSDI'24, figure 8, ShareGPT) in our simulator, with its coefficients.

`python -m benchmarks.distserve_paper FOLDER`, where FOLDER has LLMServe/DistServe's profiles
(a100_80g_distserve.json, a100_80g_vllm.json). Prints goodput a GPU at 90 % attainment in two ways: as the
paper measured, 100 prompts a GPU and point into an empty cluster, all counted; and in steady state, 200 s
of which the first quarter isn't counted.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.sharegpt_lengths import SHAREGPT
from planner.placements.bound import Lengths
from planner.placements.goodput import Probe, find_goodput
from planner.placements.placement import Candidate, Mode, WorkerKind
from planner.placements.simulated_candidate import SimulatedCandidate
from planner.plan.file import PlanFile
from planner.plan.run import Problem, read_problem

DEVICE = "a100-80g"
PROMPTS_A_GPU = 100
DRAWN = 4000
ATTAINMENT = 0.9
TOLERANCE = 0.01
DISTSERVE, VLLM = "a100_80g_distserve.json", "a100_80g_vllm.json"


@dataclass(frozen=True, slots=True)
class Case:
    """A candidate under the paper's SLO; `paper_rps` is its goodput a GPU, None where the paper has none."""

    name: str
    profile: str
    candidate: Candidate
    paper_rps: float | None = None
    policy: str = "sarathi"
    model: str = "opt-13b"
    ttft_s: float = 0.25
    tpot_s: float = 0.1
    memory_gib: int = 80
    bound_rps: float = 3.2

    @property
    def gpus(self) -> int:
        """GPUs of the candidate."""
        return sum(self.candidate.devices.values())


@dataclass(frozen=True, slots=True)
class Figure:
    """What was simulated of a case, a GPU: goodput both ways, and the attainment at the paper's own rate."""

    case: Case
    as_paper_rps: float
    steady_rps: float
    at_paper_rate: float | None


def _split(prefill: tuple[int, int], decode: tuple[int, int]) -> Candidate:
    return Candidate(Mode.DISAGGREGATED, WorkerKind(DEVICE, *prefill), 1, WorkerKind(DEVICE, *decode), 1)


def _together(tp: int) -> Candidate:
    return Candidate(Mode.COLOCATED, WorkerKind(DEVICE, tp), 1)


_OPT_13B: dict[str, Any] = {"model": "opt-13b", "ttft_s": 0.25, "tpot_s": 0.1}
_OPT_66B: dict[str, Any] = {"model": "opt-66b", "ttft_s": 2.5, "tpot_s": 0.15, "bound_rps": 1.1}
_SPLIT_66B = _split((4, 1), (2, 2))


def _baselines(profile: str, tp: int, paper_rps: float | None, model: dict[str, Any]) -> tuple[Case, Case]:
    return (
        Case("colocated, prefill first", profile, _together(tp), paper_rps, "prefill_first", **model),
        Case("colocated, chunked prefill", profile, _together(tp), **model),
    )


CASES = (
    Case("disaggregated", DISTSERVE, _split((2, 1), (1, 1)), 2.30, **_OPT_13B),
    *_baselines(VLLM, 1, 0.50, _OPT_13B),
    *_baselines(DISTSERVE, 1, None, _OPT_13B),
    Case("disaggregated", DISTSERVE, _SPLIT_66B, 0.955, **_OPT_66B),
    Case("disaggregated, twice the memory", DISTSERVE, _SPLIT_66B, 0.955, memory_gib=160, **_OPT_66B),
    *_baselines(VLLM, 4, 0.347, _OPT_66B),
    *_baselines(DISTSERVE, 4, None, _OPT_66B),
)
"""Placements of the paper's evaluation; chunked prefill is a baseline that it doesn't have."""


def figures(folder: Path, cases: tuple[Case, ...] = CASES) -> Iterator[Figure]:
    """Simulates one case after the other."""
    for case in cases:
        as_paper = {"requests": PROMPTS_A_GPU * case.gpus, "seconds": 0, "uncounted": 0, "seeds": range(10)}
        steady = {"requests": 1000, "seconds": 200, "uncounted": 0.25, "seeds": range(2)}
        both = [_goodput(_problem(case, folder, workload), case) for workload in (as_paper, steady)]
        reached = None
        if case.paper_rps is not None:
            simulate = SimulatedCandidate(_problem(case, folder, as_paper))
            reached = simulate(case.candidate, case.paper_rps * case.gpus).share
        yield Figure(case, both[0] / case.gpus, both[1] / case.gpus, reached)


def _problem(case: Case, folder: Path, workload: dict[str, Any]) -> Problem:
    lengths = {"mean": 1}
    plan = PlanFile.model_validate(
        {
            "model": case.model,
            "hardware": [
                {
                    "device": DEVICE,
                    "nodes": 1,
                    "devices_per_node": 8,
                    "memory": case.memory_gib << 30,
                    "latency": {"kind": "distserve", "file": case.profile, "key": f"facebook/{case.model}"},
                }
            ],
            "workload": {"prompt_tokens": lengths, "output_tokens": lengths, **workload},
            "slo": {"ttft_s": case.ttft_s, "tpot_s": case.tpot_s, "attainment": ATTAINMENT},
            "memory_use": 0.93,
            "whole_prompts": case.policy == "prefill_first" or case.candidate.mode is Mode.DISAGGREGATED,
            "token_budget": 512 if case.policy == "sarathi" and case.candidate.decode is None else 2048,
            "colocated_policy": case.policy,
            "search": {"tolerance": TOLERANCE},
        }
    )
    drawn = random.Random(0).choices(SHAREGPT, k=DRAWN)
    return replace(read_problem(plan, folder), buckets=(Lengths(tuple(drawn)),))


def _goodput(problem: Problem, case: Case) -> float:
    probe = Probe(case.candidate, case.bound_rps * case.gpus)
    return find_goodput(SimulatedCandidate(problem), probe, ATTAINMENT, TOLERANCE).rate_rps


def main(folder: Path) -> None:
    """Prints a table in Markdown."""
    print(
        "| model | placement | coefficients | paper | as the paper measured | steady state | "
        "attainment at the paper's rate |"
    )
    print("|---|---|---|---|---|---|---|")
    for one in figures(folder):
        case = one.case
        engine = "DistServe" if case.profile == DISTSERVE else "vLLM 2024"
        paper = "" if case.paper_rps is None else f"{case.paper_rps:g}"
        reached = "" if one.at_paper_rate is None else f"{one.at_paper_rate:.1%}"
        print(
            f"| {case.model} | {case.name}: {case.candidate} | {engine} | {paper} | "
            f"{one.as_paper_rps:.3f} | {one.steady_rps:.3f} | {reached} |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
