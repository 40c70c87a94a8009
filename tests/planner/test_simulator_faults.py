"""Edge: random deaths, revivals, role flips and failed transfers: nothing is lost, doubled or leaked.

A failing schedule is written to a JSON file, which `replay` runs again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.simulation.setup import Drive, Fault, FaultKind, RouterRules, Setup
from planner.simulator import simulate
from planner.workloads.workload import SimRequest
from tandem.ids import WorkerId
from tests.planner.clusters import CHAT, SHORT_HOPS, disaggregated, early_fetch, load, rows
from tests.planner.linear_latency import TICK_S

NAMES = [f"{role}-{number}" for role in ("prefill", "decode") for number in range(2)]
FAULTS = st.lists(
    st.builds(
        Fault,
        st.integers(0, 4 << 20).map(lambda ticks: ticks * TICK_S),
        st.sampled_from(FaultKind),
        st.sampled_from([WorkerId(name) for name in NAMES]),
    ),
    max_size=8,
)
SCHEDULES = int(os.environ.get("FAULT_SCHEDULES", "1000"))


def _cluster(
    blocks: int, drive: Drive, faults: Sequence[Fault], early: bool, rules: RouterRules | None = None
) -> Setup:
    """With `early`, KV moves while prompts are read, and messages take time."""
    return disaggregated(
        2,
        2,
        blocks,
        drive,
        faults,
        rules=rules,
        early=early_fetch() if early else None,
        hops=SHORT_HOPS if early else None,
    )


def schedule_json(faults: Sequence[Fault], seed: int, blocks: int, drive: Drive, early: bool) -> str:
    """A schedule as text."""
    struck = [{"at_s": fault.at_s, "kind": fault.kind.value, "worker": fault.worker_id} for fault in faults]
    told = {"faults": struck, "seed": seed, "blocks": blocks, "drive": drive.value, "early": early}
    return json.dumps(told)


def replay(text: str) -> None:
    """Runs a schedule, and asserts what must hold after it."""
    told = json.loads(text)
    faults = [
        Fault(struck["at_s"], FaultKind(struck["kind"]), WorkerId(struck["worker"]))
        for struck in told["faults"]
    ]
    check(faults, told["seed"], told["blocks"], Drive(told["drive"]), told["early"])


def check(faults: Sequence[Fault], seed: int, blocks: int, drive: Drive, early: bool) -> None:
    """`simulate` itself raises when a block is leaked."""
    rules = RouterRules(
        (CHAT,), context_tokens=4096, request_timeout_s=60.0, park_requests_s=5.0, max_queued=20
    )
    asked = load(12, 10.0, seed, longest=300)
    setup = _cluster(blocks, drive, faults, early, rules)
    records = simulate(setup, asked).records
    assert sorted(records.numbers) == [request.number for request in asked]
    wanted = {request.number: request.output_tokens for request in asked}
    done = zip(records.numbers, records.names("outcome"), records.counts["output_tokens"], strict=True)
    for number, outcome, tokens in done:
        assert tokens == wanted[number] if outcome == "finished" else tokens <= wanted[number]


@settings(max_examples=SCHEDULES)
@given(FAULTS, st.integers(0, 50), st.sampled_from([60, 400]), st.booleans())
def test_no_schedule_of_faults_loses_doubles_or_leaks(
    faults: Sequence[Fault], seed: int, blocks: int, early: bool
) -> None:
    """Half of them with KV that moves while prompts are read, and messages that take time."""
    try:
        check(faults, seed, blocks, Drive.RUNS, early)
    except BaseException:
        failed = Path(os.environ.get("FAULT_FILE", "fault-schedule.json"))
        failed.write_text(schedule_json(faults, seed, blocks, Drive.RUNS, early))
        raise


@settings(max_examples=60)
@given(FAULTS, st.integers(0, 50), st.sampled_from([60, 400]), st.booleans())
def test_faults_strike_runs_and_single_steps_alike(
    faults: Sequence[Fault], seed: int, blocks: int, early: bool
) -> None:
    asked = load(12, 10.0, seed, longest=300)
    setup = _cluster(blocks, Drive.RUNS, faults, early)
    assert rows(setup, asked) == rows(replace(setup, drive=Drive.STEPS), asked)


def test_a_schedule_can_be_replayed_from_its_file() -> None:
    faults = [
        Fault(0.5, FaultKind.DEATH, WorkerId("decode-0")),
        Fault(0.6, FaultKind.TRANSFER, WorkerId("decode-1")),
        Fault(1.0, FaultKind.REVIVAL, WorkerId("decode-0")),
    ]
    replay(schedule_json(faults, 3, 400, Drive.RUNS, early=True))


def test_a_dead_decode_worker_costs_time_and_no_answer() -> None:
    asked = [SimRequest(0, 0.0, 64, 200, "chat")]
    setup = disaggregated(1, 2, drive=Drive.RUNS)
    alone = simulate(setup, asked).records
    death = Fault(0.5, FaultKind.DEATH, WorkerId(alone.names("decode_worker")[0]))
    killed = simulate(replace(setup, faults=(death,)), asked).records
    assert killed.names("outcome") == ["finished"]
    assert killed.counts["output_tokens"] == alone.counts["output_tokens"]
    assert list(killed.counts["replacements"]) == [1]
    assert killed.times["ended_s"][0] > alone.times["ended_s"][0]


def test_a_flipped_worker_serves_in_its_other_role() -> None:
    asked = load(40, 20.0, 2)
    setup = disaggregated(2, 1, blocks=2000, drive=Drive.RUNS)
    flip = Fault(0.1, FaultKind.FLIP, WorkerId("prefill-1"))
    used = simulate(replace(setup, faults=(flip,)), asked).used
    assert used[WorkerId("prefill-1")].output_tokens > 0


def test_without_a_worker_of_a_role_requests_fail_in_bounded_time() -> None:
    rules = RouterRules((CHAT,), park_requests_s=5.0)
    setup = disaggregated(1, 1, drive=Drive.RUNS, rules=rules)
    dead = replace(setup, faults=(Fault(0.0, FaultKind.DEATH, WorkerId("prefill-0")),))
    records = simulate(dead, [SimRequest(0, 1.0, 64, 20, "chat")]).records
    assert records.names("outcome") == ["NotReady"]
    assert records.times["ended_s"][0] == 6.0
