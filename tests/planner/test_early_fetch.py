"""Edge: KV that moves while its prompt is read, and messages that take time, in closed form.

A prompt of P tokens read in one step takes T = (4096 + 64 P) ticks; its KV is P / 16 blocks of 8 layers.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.handoffs.pieces import MIN_PIECE_BYTES
from planner.latency import PromptPart, StepShape
from planner.simulation.setup import Drive, EarlyFetch, Hops, RouterRules, Setup
from planner.simulator import simulate
from planner.step_times.transfer_links import LinkTransfer, link_of_rate
from planner.workloads.workload import SimRequest
from tests.planner.clusters import (
    CHAT,
    LAYER_BYTES,
    LAYERS,
    SHORT_HOPS,
    disaggregated,
    early_fetch,
    load,
    rows,
)
from tests.planner.linear_latency import TICK_S, LinearLatency, LinearTransfer

BLOCK = 16
STEPS = LinearLatency()
MOVES = LinearTransfer()


def handoff_s(setup: Setup, prompt_tokens: int) -> float:
    """From the first token until the KV landed, of a lone request."""
    records = simulate(setup, [SimRequest(0, 0.0, prompt_tokens, 8, "chat")]).records
    return records.times["handoff_s"][0]


def reading_s(tokens: int, context: int = 0) -> float:
    return STEPS.step_s(StepShape((PromptPart(tokens, context),)))


def moving_s(blocks: int, layers: int, last: bool = False) -> float:
    return MOVES.piece_s(blocks * layers * LAYER_BYTES, last, True)


def test_without_early_fetch_the_whole_handoff_comes_after_the_first_token() -> None:
    assert handoff_s(disaggregated(1, 1), 480) == MOVES.transfer_s(480, same_node=True)


def test_what_is_left_after_a_prompt_of_one_step_is_its_last_layers() -> None:
    """30 blocks: one layer of all is 1.9 MB, a piece. The layers come evenly; each moves before the next is
    ready, so that the last one alone is left.
    """
    assert moving_s(30, 1) < reading_s(480) / LAYERS
    assert handoff_s(disaggregated(1, 1, early=early_fetch()), 480) == moving_s(30, 1, last=True)


def test_whole_blocks_move_while_later_chunks_are_read() -> None:
    """1,024 tokens in two steps of 512 over a slow link: the first 32 blocks take the whole second step."""
    tokens_a_step = 512
    slow = EarlyFetch(64, LAYERS, LAYER_BYTES, replace(MOVES, per_token=64))
    setup = disaggregated(1, 1, early=slow)
    # The first half moves as one piece from the end of step one on: 32 blocks x 16 units x 64 ticks.
    first_half_s = slow.model.piece_s(32 * LAYERS * LAYER_BYTES, False, True)
    second_step_s = reading_s(tokens_a_step, tokens_a_step)
    assert first_half_s < second_step_s
    # Then the layers that are ready by then, then the rest, which is whole meanwhile.
    ready = int(first_half_s / second_step_s * LAYERS)
    early_s = slow.model.piece_s(32 * ready * LAYER_BYTES, False, True)
    late_s = slow.model.piece_s(32 * (LAYERS - ready) * LAYER_BYTES, True, True)
    assert handoff_s(setup, 1024) == pytest.approx(first_half_s + early_s + late_s - second_step_s)


def test_pieces_are_as_large_as_the_live_rule_wants_them() -> None:
    """Of 4 blocks a layer is 256 KiB: four layers make a piece, and four more are left."""
    assert 4 * 4 * LAYER_BYTES == MIN_PIECE_BYTES
    assert handoff_s(disaggregated(1, 1, early=early_fetch()), 64) == moving_s(4, 4, last=True)


def test_a_handoff_of_one_piece_takes_what_a_whole_one_does() -> None:
    link = link_of_rate(1e9, 1e-4)
    model = LinkTransfer(LAYERS * LAYER_BYTES / BLOCK, BLOCK, link, link, hand_over_s=0.002, ask_s=0.001)
    whole = 30 * LAYERS * LAYER_BYTES
    assert model.piece_s(whole, True, True) == model.transfer_s(480, True)
    assert model.piece_s(whole, False, True) == pytest.approx(model.transfer_s(480, True) - 0.001)


def test_prompts_below_the_threshold_move_afterwards() -> None:
    setup = disaggregated(1, 1, early=early_fetch(481))
    assert handoff_s(setup, 480) == MOVES.transfer_s(480, same_node=True)


def test_no_decode_worker_with_room_means_no_early_fetch() -> None:
    """The pool holds one prompt and its growth: the second waits until the first has gone."""
    asked = [SimRequest(number, 0.0, 480, 8, "chat") for number in range(2)]
    setup = disaggregated(1, 1, blocks=62, token_budget=480, early=early_fetch())
    setup = replace(setup, workers=(setup.workers[0], replace(setup.workers[1], pool_blocks=40)))
    handoffs_s = sorted(simulate(setup, asked).records.times["handoff_s"])
    assert handoffs_s[0] == moving_s(30, 1, last=True)
    assert handoffs_s[1] >= MOVES.transfer_s(480, same_node=True)


def test_hops_delay_what_the_client_sees_by_their_sums() -> None:
    """First token: the door, to the prefill worker and back. Then: the offer is told as the token is."""
    asked = [SimRequest(0, 1.0, 480, 2, "chat")]
    near = simulate(disaggregated(1, 1), asked).records.times
    far = simulate(disaggregated(1, 1, hops=SHORT_HOPS), asked).records.times
    there_and_back_s = SHORT_HOPS.to_worker_s + SHORT_HOPS.to_router_s
    assert far["ttft_s"][0] == near["ttft_s"][0] + SHORT_HOPS.front_door_s + there_and_back_s
    assert far["handoff_s"][0] == near["handoff_s"][0] + there_and_back_s
    assert far["tpot_s"][0] == near["tpot_s"][0] + there_and_back_s


def test_steady_tokens_are_not_slowed_by_hops() -> None:
    asked = [SimRequest(0, 0.0, 480, 100, "chat")]
    near = simulate(disaggregated(1, 1), asked).records.times
    far = simulate(disaggregated(1, 1, hops=SHORT_HOPS), asked).records.times
    there_and_back_s = SHORT_HOPS.to_worker_s + SHORT_HOPS.to_router_s
    assert far["tpot_s"][0] * 99 == pytest.approx(near["tpot_s"][0] * 99 + there_and_back_s)


SEEDS = st.integers(0, 10_000)
HOPS = st.sampled_from([Hops(), SHORT_HOPS, Hops(0.0, 0.0, 700 * TICK_S)])


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([2.0, 20.0, 100.0]), st.sampled_from([60, 150, 2000]), HOPS, st.booleans())
def test_runs_of_steps_give_the_records_of_single_steps(
    seed: int, rate_rps: float, blocks: int, hops: Hops, early: bool
) -> None:
    """Small pools lose early fetches, so that prompts are placed in every way."""
    setup = disaggregated(2, 2, blocks, hops=hops, early=early_fetch() if early else None)
    asked = load(40, rate_rps, seed)
    stepwise = rows(replace(setup, drive=Drive.STEPS), asked)
    assert rows(replace(setup, drive=Drive.RUNS), asked) == stepwise
    assert rows(setup, asked) == stepwise


def test_early_fetches_are_lost_where_blocks_run_out_and_no_answer_with_them() -> None:
    asked = load(60, 100.0, 3)
    setup = disaggregated(2, 1, blocks=100, early=early_fetch())
    records = simulate(setup, asked).records
    wanted = {request.number: request.output_tokens for request in asked}
    assert dict(zip(records.numbers, records.counts["output_tokens"], strict=True)) == wanted


def test_early_fetch_shortens_handoffs_of_a_mixed_load() -> None:
    draws = random.Random(5)
    asked: Sequence[SimRequest] = [
        SimRequest(number, number * 0.2, draws.randint(64, 2000), 20, "chat") for number in range(50)
    ]
    rules = RouterRules((CHAT,), context_tokens=4096)
    means = [
        sum(simulate(disaggregated(2, 2, 2000, rules=rules, early=early), asked).records.times["handoff_s"])
        for early in (None, early_fetch())
    ]
    assert means[1] < means[0] / 2


def test_an_early_fetch_gives_way_to_a_sample_that_grows() -> None:
    """The first decodes 280 tokens while the second, whose blocks are taken, is read in steps of 4 tokens."""
    asked = [SimRequest(0, 0.0, 480, 280, "chat"), SimRequest(1, 0.0, 400, 8, "chat")]
    setup = disaggregated(1, 1, blocks=58, token_budget=4, early=early_fetch())
    roomy = disaggregated(1, 1, blocks=400, token_budget=4, early=early_fetch())
    tight, free = simulate(setup, asked).records, simulate(roomy, asked).records
    assert list(tight.counts["replacements"]) == [0, 0]
    handoffs_s = [dict(zip(r.numbers, r.times["handoff_s"], strict=True))[1] for r in (tight, free)]
    assert handoffs_s[1] < MOVES.transfer_s(400, same_node=True) <= handoffs_s[0]


def test_kv_that_landed_before_its_first_token_was_heard_of_is_kept() -> None:
    """The token's way to the router is longer than the last piece's."""
    slow = Hops(to_router_s=0.5)
    asked = [SimRequest(0, 0.0, 480, 8, "chat")]
    records = simulate(disaggregated(1, 1, hops=slow, early=early_fetch()), asked).records
    assert records.times["handoff_s"][0] == slow.to_router_s
    assert list(records.counts["output_tokens"]) == [8]
