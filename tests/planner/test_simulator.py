"""Edge: the simulated cluster: the same records however it is driven, and what queueing theory says."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.latency import StepShape
from planner.simulation.plain_cluster import PlainCluster
from planner.simulation.plain_request import NotPlainError
from planner.simulation.setup import Drive, RouterRules, Setup, SimRole
from planner.simulator import simulate
from planner.workloads.workload import SimRequest
from tandem.ids import WorkerId
from tests.planner.clusters import CHAT, colocated, disaggregated, load, rows, written
from tests.planner.linear_latency import LinearTransfer

SEEDS = st.integers(0, 10_000)
RATES = st.sampled_from([2.0, 20.0, 100.0])


@settings(max_examples=40)
@given(SEEDS, RATES, st.integers(1, 3), st.integers(1, 3), st.sampled_from([60, 150, 2000]))
def test_runs_of_steps_give_the_records_of_single_steps(
    seed: int, rate_rps: float, prefill: int, decode: int, blocks: int
) -> None:
    """Small pools preempt, so that runs are cut in every way."""
    setup = disaggregated(prefill, decode, blocks)
    asked = load(40, rate_rps, seed)
    stepwise = rows(replace(setup, drive=Drive.STEPS), asked)
    assert rows(replace(setup, drive=Drive.RUNS), asked) == stepwise
    assert rows(setup, asked) == stepwise


@settings(max_examples=20)
@given(SEEDS, RATES)
def test_a_prefix_cache_gives_the_same_records_in_runs_and_in_steps(seed: int, rate_rps: float) -> None:
    draws = random.Random(seed)
    asked = []
    for request in load(30, rate_rps, seed, longest=100):
        prefix = tuple(range(draws.randrange(3)))
        asked.append(
            request._replace(prompt_tokens=request.prompt_tokens + 512 * len(prefix), prefix_ids=prefix)
        )
    rules = RouterRules((CHAT,), context_tokens=4096, dispatch="prefix_aware")
    setup = disaggregated(blocks=300, prefix_cache=True, drive=Drive.RUNS, rules=rules)
    assert rows(setup, asked) == rows(replace(setup, drive=Drive.STEPS), asked)


def test_prompts_go_where_their_prefix_is_cached() -> None:
    """Three kinds of prompt, four workers: spread in turn, each kind is read by every worker."""
    asked = [
        SimRequest(number, 2.0 * number, 1100, 5, "chat", (number % 3, 3 + number % 3))
        for number in range(60)
    ]
    cached = {}
    for dispatch in ("round_robin", "prefix_aware"):
        rules = RouterRules((CHAT,), context_tokens=4096, dispatch=dispatch)
        setup = disaggregated(prefill=4, prefix_cache=True, rules=rules)
        records = simulate(setup, asked).records
        cached[dispatch] = sum(records.counts["cached_tokens"])
    # Each kind is read once; of the other 57 prompts two prefixes of 512 tokens are known.
    assert cached["prefix_aware"] == 57 * 1024
    assert cached["round_robin"] < cached["prefix_aware"]


@settings(max_examples=20)
@given(SEEDS, RATES, st.booleans(), st.sampled_from(["round_robin", "least_loaded", "prefix_aware"]))
def test_the_plain_course_gives_the_records_of_the_full_objects(
    seed: int, rate_rps: float, whole_prompts: bool, dispatch: str
) -> None:
    rules = RouterRules((CHAT,), dispatch=dispatch, context_tokens=700, max_queued=8)
    setup = disaggregated(2, 3, 2000, whole_prompts=whole_prompts, max_batch=7, rules=rules)
    asked = load(60, rate_rps, seed)
    plain = PlainCluster(setup, asked)
    plain.run()
    assert list(plain.records.csv_lines()) == rows(replace(setup, drive=Drive.RUNS), asked)


def test_what_leaves_the_plain_course_is_simulated_in_full() -> None:
    """Decode workers run out of blocks here, and preempt."""
    setup, asked = disaggregated(1, 1, 60), load(30, 100.0, 1)
    with pytest.raises(NotPlainError):
        PlainCluster(setup, asked).run()
    records = simulate(setup, asked).records
    assert len(records) == 30
    assert sum(records.counts["replacements"]) > 0


@pytest.mark.parametrize("drive", list(Drive))
def test_the_same_seed_gives_the_same_bytes(drive: Drive) -> None:
    setup = disaggregated(drive=drive)
    assert rows(setup, load(50, 30.0, 3)) == rows(setup, load(50, 30.0, 3))
    assert rows(setup, load(50, 30.0, 3)) != rows(setup, load(50, 30.0, 4))


@pytest.mark.parametrize("policy", ["prefill_first", "sarathi", "mlfq"])
@pytest.mark.parametrize("blocks", [80, 2000])
def test_colocated_workers_answer_every_request_in_full(policy: str, blocks: int) -> None:
    asked = load(60, 60.0, 7)
    result = simulate(colocated(policy, blocks=blocks), asked)
    assert written(result) == {request.number: request.output_tokens for request in asked}
    assert set(result.records.names("outcome")) == {"finished"}


def test_chunked_prefill_stalls_decoding_less_than_prefill_first() -> None:
    asked = load(80, 60.0, 7)
    longest = {
        policy: max(
            simulate(colocated(policy, blocks=4000, token_budget=budget), asked).records.times_of(
                "longest_gap_s", "chat"
            )
        )
        for policy, budget in (("prefill_first", 2048), ("sarathi", 128))
    }
    assert longest["sarathi"] < longest["prefill_first"]


def test_skip_join_lets_short_answers_pass_long_ones() -> None:
    """FastServe's point: a short job that comes behind long ones doesn't wait for them."""
    long = [SimRequest(number, 0.0, 64, 600, "chat") for number in range(8)]
    asked = [*long, SimRequest(8, 0.5, 16, 4, "chat")]
    setups = {policy: colocated(policy, count=1, blocks=4000) for policy in ("sarathi", "mlfq")}
    small = {
        policy: replace(setup, workers=tuple(replace(spec, max_batch=4) for spec in setup.workers))
        for policy, setup in setups.items()
    }
    ends = {}
    for policy, setup in small.items():
        records = simulate(setup, asked).records
        ends[policy] = dict(zip(records.numbers, records.times["ended_s"], strict=True))[8]
    assert ends["mlfq"] < ends["sarathi"] / 2


@dataclass(frozen=True, slots=True)
class _FixedService:
    """Every step takes the same time."""

    service_s: float

    def step_s(self, shape: StepShape) -> float:
        return self.service_s

    def stage_s(self, shape: StepShape) -> float:
        return self.service_s

    def decode_run_s(self, batch: int, context_tokens: int, steps: int) -> float:
        return steps * self.service_s

    def decode_steps_within(self, batch: int, context_tokens: int, within_s: float) -> int:
        return int(within_s / self.service_s)


def _poisson(count: int, rate_rps: float, seed: int) -> Sequence[SimRequest]:
    draws = random.Random(seed)
    at_s, asked = 0.0, []
    for number in range(count):
        at_s += draws.expovariate(rate_rps)
        asked.append(SimRequest(number, at_s, 512, 1, "chat"))
    return asked


@pytest.mark.parametrize(
    ("utilisation", "count"), [(0.3, 20_000), (0.5, 20_000), (0.7, 200_000), (0.9, 200_000)]
)
def test_a_prefill_worker_is_an_m_d_1_queue(utilisation: float, count: int) -> None:
    """Mean time to first token: D + R D^2 / (2 (1 - R D)), for prompts that fill a step each.

    The busier the worker, the longer its waits depend on each other.
    """
    service_s = 0.1
    rate = utilisation / service_s
    base = disaggregated(1, 1, 100_000)
    model = _FixedService(service_s)
    setup = Setup(tuple(replace(spec, latency=model) for spec in base.workers), base.router, LinearTransfer())
    times = simulate(setup, _poisson(count, rate, 11)).records.times["ttft_s"]
    expected_s = service_s + rate * service_s**2 / (2 * (1 - utilisation))
    assert sum(times) / len(times) == pytest.approx(expected_s, rel=0.02)


def test_a_worker_of_each_role_is_needed() -> None:
    setup = disaggregated(1, 1)
    only = tuple(spec for spec in setup.workers if spec.role is SimRole.PREFILL)
    with pytest.raises(Exception, match="no decode worker"):
        simulate(replace(setup, workers=only), [])


def test_requests_must_come_in_order() -> None:
    late, early = SimRequest(0, 5.0, 10, 2, "chat"), SimRequest(1, 1.0, 10, 2, "chat")
    with pytest.raises(Exception, match="before an earlier one"):
        simulate(disaggregated(), [late, early])


def test_names_of_workers_are_unique() -> None:
    setup = disaggregated(1, 1)
    twin = replace(setup.workers[1], worker_id=WorkerId("prefill-0"))
    with pytest.raises(Exception, match="same name"):
        simulate(replace(setup, workers=(*setup.workers, twin)), [])


def test_a_spec_names_a_known_policy() -> None:
    with pytest.raises(Exception, match="policy must be one of"):
        simulate(colocated("lottery"), [])
