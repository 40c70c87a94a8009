"""Edge: docs/json-output.md names exactly the keys that the commands print."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.forecast_report import Compared, Figures, forecast_json
from benchmarks.kv import result_json
from benchmarks.kv_codec_rates import codec_rates
from benchmarks.kv_layouts import SMALL_BLOCKS, Layout, Placement
from benchmarks.kv_times import AdoptionTimes, CaseTimes, HandoffTimes, OverlapFigures, Road, Timed
from benchmarks.latency_summary import Outcome, OutcomeKind, Spread, TokenArrival, summarise
from benchmarks.relay_load import LoadResult
from benchmarks.router_relay import relay_json
from benchmarks.serve import serve_json
from benchmarks.simulator_speed import measure
from kvtransfer.contract import PullReport
from planner.placements.mix import Mix
from planner.placements.placement import Candidate, Mode, WorkerKind
from planner.plan.result import PlanResult, Ranked, plan_json
from planner.simulate.output import simulation_json
from planner.simulator import simulate
from tandem.cli.json_output import generation_json, status_json
from tandem.generation import update_from_wire
from tandem.slo import SloClass
from tandem.v1 import cluster_pb2, worker_pb2
from tandem.v1 import inference_pb2 as pb
from tests.planner.clusters import disaggregated, load
from tests.planner.live_profiles import live_profile

PAGE = Path(__file__).parent.parent.parent / "docs" / "json-output.md"


def documented(section: str) -> list[str]:
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def keys_of(value: Any, path: str = "") -> Iterator[str]:
    """Paths of all leaves; a list of objects is shown by its first."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from keys_of(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        yield from keys_of(value[0], f"{path}[]")
    else:
        yield path


def generation() -> dict[str, Any]:
    response = pb.GenerateResponse(
        request_id="r",
        chunks=[pb.TokenChunk(token_ids=[5], text="a", finish_reason=pb.FINISH_REASON_STOP)],
        usage=pb.Usage(prompt_tokens=1, completion_tokens=1),
        timeline=pb.Timeline(ttft_s=0.5),
    )
    return generation_json([update_from_wire(response)])


def status() -> dict[str, Any]:
    worker = cluster_pb2.WorkerStatus(
        worker=worker_pb2.WorkerAddress(worker_id="w"), role=worker_pb2.ROLE_DECODE
    )
    role = cluster_pb2.RoleStatus(role=worker_pb2.ROLE_DECODE, desired=2, actual=1)
    return status_json(
        cluster_pb2.StatusResponse(
            workers=[worker], slo_classes=[cluster_pb2.SloClassStatus(name="a")], roles=[role]
        )
    )


def serve() -> dict[str, Any]:
    slo = SloClass("a", 1.0, 1.0, 1.0)
    outcome = Outcome(
        OutcomeKind.COMPLETED, "a", 0.0, 0.0, 1.0, 3, (TokenArrival(0.5, 1), TokenArrival(0.6, 1))
    )
    chosen = argparse.Namespace(
        api="grpc", trace=None, rate=1.0, length_scale=1.0, seed=0, limit=1, max_output_tokens=8
    )
    return serve_json(chosen, "poisson", summarise([outcome], {"a": slo}))


def relay() -> dict[str, Any]:
    result = LoadResult(20_000.0, 10_000.0, (0.001,), (0.002,), (0.003,), 1.0, 0.3, 0.3)
    return relay_json([result], streams=4)


def planned() -> dict[str, Any]:
    candidate = Candidate(Mode.DISAGGREGATED, WorkerKind("l4"), 1, WorkerKind("l4"), 1)
    ranked = Ranked(candidate, 2.0, 2, 2.0, "time per token fails first, at 2.1 req/s")
    return plan_json(PlanResult(Mix(((candidate, 1),), 2.0, 2.0), (ranked,), 9, 8, 1, ("a roofline",)))


def kv() -> dict[str, Any]:
    timed = Timed(PullReport("shm", 98_304, 1, 0.001, 0.0, 0.0, 0.002, 0.002, 0.0, 0.001), 0.005)
    layout = Layout(SMALL_BLOCKS, Placement.SCATTERED, (4,))
    case = CaseTimes(layout, 4, (0.001,), (0.002,), (0.003,), {Road("shm", True): (timed,)})
    adoption = AdoptionTimes(1, 65_536, *[(0.001,)] * 6)
    overlap = OverlapFigures("identity", 1200, 125e6, 55_296_000, 3, 0.442, 2.0, 2.1, 0.480, 0.012, 0.025)
    handoffs = HandoffTimes(layout, 2, case.roads)
    return result_json([case], 1, handoffs, [adoption], overlap, codec_rates(1))


def forecast() -> dict[str, Any]:
    found = Figures(Spread(0.1, 0.1, 0.2, 0.3), Spread(0.1, 0.1, 0.2, 0.3), 0.9)
    conditions = {
        "date": "",
        "machine": "",
        "load_average_before": 0.1,
        "trace": "azure.csv",
        "length_scale": 0.05,
        "requests": 300,
        "slo_s": [0.5, 0.1, 1.0],
    }
    compared = [Compared(1.0, 0.1, 0.2, found, found, 0.0)]
    return forecast_json(conditions, compared, live_profile().model_dump(mode="json"))


@pytest.mark.parametrize(
    ("section", "output"),
    [
        ("tandem generate", generation()),
        ("tandem status", status()),
        ("tandem bench serve", serve()),
        ("tandem bench router", relay()),
        ("tandem simulate", simulation_json(simulate(disaggregated(1, 1), load(5, 5.0, 1)))),
        ("tandem bench sim", measure(None, count=5, rate_rps=1.0, runs=1)),
        ("tandem plan", planned()),
        ("tandem bench sim --live", forecast()),
        ("tandem bench kv", kv()),
    ],
)
def test_documented_keys_are_those_produced(section: str, output: dict[str, Any]) -> None:
    assert list(keys_of(output)) == documented(section)


def test_samples_are_put_together_from_their_chunks() -> None:
    chunks = [
        pb.GenerateResponse(
            request_id="r",
            chunks=[
                pb.TokenChunk(sample_index=1, token_ids=[7], text="x"),
                pb.TokenChunk(sample_index=0, token_ids=[5], text="a"),
            ],
        ),
        pb.GenerateResponse(
            request_id="r",
            chunks=[
                pb.TokenChunk(
                    sample_index=0,
                    first_index=1,
                    token_ids=[6],
                    text="b",
                    finish_reason=pb.FINISH_REASON_LENGTH,
                )
            ],
        ),
    ]
    output = generation_json([update_from_wire(chunk) for chunk in chunks])
    assert output["samples"] == [
        {"index": 0, "text": "ab", "token_ids": [5, 6], "finish_reason": "length"},
        {"index": 1, "text": "x", "token_ids": [7], "finish_reason": None},
    ]
    assert output["usage"] is None
