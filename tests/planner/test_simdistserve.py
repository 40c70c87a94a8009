"""Pure: below saturation the simulator gives what DistServe's own simulator prints for the same requests.

FIGURES are p50 and p90 of first token latency and of tpot, seconds, that simdistserve printed
(LLMServe/DistServe, simdistserve/base at 1eead3c and 2904e8e, Apache-2.0; run apart from this project with
simpy, coefficients of its a100-80g distserve profile, prefill_max_tokens as in max_num_tokens.csv). Its
tpot divides by output tokens that come after the first one, so that its output length is ours less one.
"""

import random
from collections.abc import Iterator

import pytest

from planner.simulation.setup import RouterRules, Setup, SimRole, WorkerSpec
from planner.simulator import simulate
from planner.statistics import percentile
from planner.step_times.transfer_links import LinkTransfer, link_of_rate
from planner.workloads.workload import SimRequest
from tandem.ids import WorkerId
from tandem.slo import SloClass
from tests.planner.distserve_figures import opt_13b

REQUESTS = 1000
SEED = 11
MAX_TOKENS = 66_144
FIGURES = {
    (1, 1, 2.0): (0.107255, 0.181475, 0.026192, 0.029632),
    (1, 1, 4.0): (0.127027, 0.271385, 0.036494, 0.044884),
    (2, 1, 4.0): (0.076514, 0.139141, 0.036358, 0.044874),
}
"""By tp of prefill, tp of decode, requests a second."""


def _requests(rate_rps: float) -> Iterator[SimRequest]:
    draws, now_s = random.Random(SEED), 0.0
    for number in range(REQUESTS):
        now_s += draws.expovariate(rate_rps)
        yield SimRequest(number, now_s, draws.randint(10, 1500), draws.randint(2, 400) + 1, "any")


def _setup(prefill_tp: int, decode_tp: int) -> Setup:
    free = link_of_rate(1e18, 0.0)
    prefill = WorkerSpec(
        WorkerId("prefill"),
        SimRole.PREFILL,
        opt_13b(prefill_tp),
        pool_blocks=100_000,
        token_budget=MAX_TOKENS,
        whole_prompts=True,
    )
    decode = WorkerSpec(
        WorkerId("decode"), SimRole.DECODE, opt_13b(decode_tp), MAX_TOKENS // 16, max_batch=MAX_TOKENS
    )
    rules = RouterRules((SloClass("any", 1.0, 1.0, 1.0),))
    return Setup((prefill, decode), rules, LinkTransfer(1, 16, free, free))


@pytest.mark.parametrize(("case", "figures"), FIGURES.items(), ids=str)
def test_percentiles_are_those_of_simdistserve(
    case: tuple[int, int, float], figures: tuple[float, float, float, float]
) -> None:
    prefill_tp, decode_tp, rate_rps = case
    records = simulate(_setup(prefill_tp, decode_tp), _requests(rate_rps)).records
    found = [
        percentile(sorted(records.times[name]), share)
        for name in ("ttft_s", "tpot_s")
        for share in (0.5, 0.9)
    ]
    assert found == pytest.approx(figures, rel=0.001)
