"""Who goes next, and to which worker."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.block_hash import chain_hashes
from router.admission import Admission, WaitingQueue, fit_context
from router.dispatch import (
    POLICIES,
    DecodeNeed,
    DispatchPolicy,
    LeastLoaded,
    PrefillNeed,
    PrefixAware,
    RoundRobin,
    without_avoided,
)
from router.pacing import LONGEST_HOLD_S, Pacer
from router.placement import Placement, WaitingLeg, Windows
from router.prefix_index import PrefixIndex
from router.readiness import Readiness
from router.worker_load import ReportedLoad, WorkerLoad, WorkerView
from tandem.errors import ConfigError, Overloaded, PromptTooLong
from tandem.ids import BlockHash, LegId
from tandem.sampling import SamplingParams
from tandem.worker import Role
from tests.router.sessions import worker

BLOCK = 4
A, B, C = worker("a"), worker("b"), worker("c")
WINDOWS = Windows(prefill_tokens=100, decode_legs=2)


def view(name: str, prefill_tokens: int = 0, batch: int = 0, free: int = 50) -> WorkerView:
    return WorkerView(worker(name), prefill_tokens, batch, 0, free, 100)


def need(tokens: int = 16, hashes: tuple[BlockHash, ...] = ()) -> PrefillNeed:
    return PrefillNeed(tokens, hashes)


def leg(name: str, tokens: int = 16, **changes: object) -> WaitingLeg:
    made = WaitingLeg(LegId(name), tuple(range(tokens)), 1, frozenset(), 0, 100.0, 0.0, anew=False)
    return replace(made, **changes)  # type: ignore[arg-type]


def hashes_of(tokens: int) -> list[BlockHash]:
    return chain_hashes(list(range(tokens)), BLOCK)


def placement(*roles: tuple[str, Role], policy: str = "least_loaded") -> Placement:
    made = Placement(policy, BLOCK, WINDOWS)
    for name, role in roles:
        made.attach(WorkerLoad(worker(name), role, 100))
    return made


@pytest.mark.parametrize("name", sorted(POLICIES))
class TestEveryPolicy:
    """What holds for every dispatch policy."""

    def test_chooses_one_of_the_workers_it_was_given(self, name: str) -> None:
        policy: DispatchPolicy = POLICIES[name](PrefixIndex(), BLOCK)
        for count in (1, 2, 5):
            views = [view(f"w{i}", i, i, i) for i in range(count)]
            keys = {v.key for v in views}
            assert policy.prefill(need(), views) in keys
            assert policy.decode(DecodeNeed(4, 1, ()), views) in keys

    def test_equal_workers_share_the_legs(self, name: str) -> None:
        policy: DispatchPolicy = POLICIES[name](PrefixIndex(), BLOCK)
        views = [view("a"), view("b")]
        chosen = [policy.prefill(need(), views) for _ in range(10)]
        assert chosen.count(A) == 5


def test_round_robin_takes_turns_by_role() -> None:
    policy = RoundRobin(PrefixIndex(), BLOCK)
    views = [view("a", 1000), view("b")]
    assert [policy.prefill(need(), views) for _ in range(3)] == [A, B, A]
    assert policy.decode(DecodeNeed(1, 1, ()), views) == A


def test_least_loaded_prefill_has_fewest_outstanding_tokens() -> None:
    policy = LeastLoaded(PrefixIndex(), BLOCK)
    assert policy.prefill(need(), [view("a", 300), view("b", 200), view("c", 400)]) == B


def test_least_loaded_decode_wants_room_first_then_a_small_batch() -> None:
    policy = LeastLoaded(PrefixIndex(), BLOCK)
    views = [view("a", batch=1, free=2), view("b", batch=9, free=50), view("c", batch=8, free=40)]
    assert policy.decode(DecodeNeed(10, 1, ()), views) == C
    assert policy.decode(DecodeNeed(60, 1, ()), views) == B


def test_prefix_aware_prefers_the_worker_that_holds_the_prompt() -> None:
    index = PrefixIndex()
    hashes = hashes_of(64)
    index.apply(B, 0, hashes[:12], [], snapshot=True)
    policy = PrefixAware(index, BLOCK)
    busy_holder = [view("a"), view("b", prefill_tokens=40)]
    assert policy.prefill(need(64, tuple(hashes)), busy_holder) == B
    busier_holder = [view("a"), view("b", prefill_tokens=60)]
    assert policy.prefill(need(64, tuple(hashes)), busier_holder) == A
    assert policy.decode(DecodeNeed(16, 1, hashes), [view("a"), view("b")]) == B


def test_prefix_aware_gives_up_the_prefix_when_loads_differ_widely() -> None:
    index = PrefixIndex()
    hashes = hashes_of(40_000)
    index.apply(B, 0, hashes, [], snapshot=True)
    policy = PrefixAware(index, BLOCK)
    assert policy.prefill(need(40_000, tuple(hashes)), [view("a"), view("b", prefill_tokens=5_000)]) == A


def test_workers_that_failed_a_leg_are_avoided_while_others_exist() -> None:
    views = [view("a"), view("b")]
    assert [v.key for v in without_avoided(views, frozenset({A}))] == [B]
    assert without_avoided(views, frozenset({A, B})) == views


def test_index_asks_for_a_snapshot_after_a_gap_and_counts_leading_blocks() -> None:
    index = PrefixIndex()
    hashes = hashes_of(20)
    assert index.apply(A, 7, hashes[:1], [], snapshot=False)
    assert not index.apply(A, 7, hashes[:3], [], snapshot=True)
    assert not index.apply(A, 10, hashes[3:4], [], snapshot=False)
    assert index.overlap(A, hashes) == 4
    assert not index.apply(A, 11, [], hashes[1:2], snapshot=False)
    assert index.overlap(A, hashes) == 1
    assert index.apply(A, 13, hashes[1:2], [], snapshot=False)
    assert index.overlap(A, hashes) == 1
    index.forget(A)
    assert index.overlap(A, hashes) == 0


def test_load_is_the_larger_of_snapshot_and_own_books() -> None:
    load = WorkerLoad(A, Role.MIXED, 100)
    load.prefill_sent(LegId("1"), 30)
    assert load.view().prefill_tokens == 30
    load.heard(ReportedLoad(waiting_prefill_tokens=50, total_blocks=100, free_blocks=80), 1.0)
    load.prefill_sent(LegId("2"), 5)
    assert load.view().prefill_tokens == 55
    load.forget(LegId("1"))
    load.forget(LegId("1"))
    assert load.prefilling_tokens == 5
    load.decode_sent(LegId("3"), 10, 2)
    assert (load.view().free_blocks, load.view().batch) == (70, 2)
    load.landed(LegId("3"))
    assert (load.view().free_blocks, load.view().batch) == (80, 2)


def test_window_keeps_legs_at_the_router_but_lets_a_lone_one_through() -> None:
    place = placement(("a", Role.PREFILL))
    for name, tokens in (("big", 500), ("small", 10)):
        place.wait_for_prefill(leg(name, tokens))
    assert place.next_prefill(True) == ("big", A)
    assert place.next_prefill(True) is None
    place.offered(LegId("big"), A)
    assert place.next_prefill(True) == ("small", A)


def test_legs_placed_anew_go_before_new_ones_even_when_no_more_may_start() -> None:
    place = placement(("a", Role.PREFILL))
    place.wait_for_prefill(leg("new", priority=5))
    place.wait_for_prefill(leg("anew", anew=True))
    assert place.next_prefill(False) == ("anew", A)
    assert place.next_prefill(False) is None
    assert place.next_prefill(True) == ("new", A)


def test_decode_waits_for_a_worker_with_an_open_window() -> None:
    place = placement(("p", Role.PREFILL))
    for name in "123":
        place.wait_for_decode(leg(name))
    assert place.next_decode() is None
    assert not place.serves(Role.DECODE)
    place.attach(WorkerLoad(B, Role.DECODE, 100))
    assert [place.next_decode(), place.next_decode(), place.next_decode()] == [("1", B), ("2", B), None]
    place.landed(LegId("1"), B)
    assert place.next_decode() == ("3", B)


def test_draining_and_stalled_workers_get_nothing() -> None:
    place = placement(("a", Role.PREFILL), ("b", Role.PREFILL), ("c", Role.MIXED))
    place.loads[A].heard(ReportedLoad(draining=True), 0.0)
    place.loads[B].heard(ReportedLoad(stalled_s=60.0), 0.0)
    for name in "12":
        place.wait_for_prefill(leg(name))
    assert [place.next_prefill(True), place.next_prefill(True)] == [("1", C), ("2", C)]


def test_forgotten_leg_leaves_queue_and_books() -> None:
    place = placement(("a", Role.PREFILL), ("b", Role.DECODE))
    place.wait_for_prefill(leg("1"))
    place.forget(LegId("1"))
    assert place.next_prefill(True) is None
    place.wait_for_prefill(leg("2", 90))
    assert place.next_prefill(True) == ("2", A)
    place.forget(LegId("2"))
    assert place.loads[A].prefilling_legs == 0
    assert place.waiting_for(Role.PREFILL) == ()


def test_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="least_loaded, prefix_aware, round_robin"):
        Placement("best", BLOCK, WINDOWS)


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 3)), max_size=20), st.data())
def test_queue_order_is_priority_then_deadline_then_arrival(
    entries: list[tuple[int, int]], data: st.DataObject
) -> None:
    queue: WaitingQueue[int] = WaitingQueue()
    for item, (priority, deadline) in enumerate(entries):
        queue.push(item, priority, float(deadline))
    gone = data.draw(st.sets(st.integers(0, max(0, len(entries) - 1))))
    removed = {item for item in gone if queue.remove(item)}
    left = [item for item in range(len(entries)) if item not in removed]
    expected = sorted(left, key=lambda item: (-entries[item][0], entries[item][1], item))
    taken = []
    while (first := queue.first()) is not None:
        taken.append(first)
        queue.remove(first)
    assert taken == expected


def test_full_queue_says_when_to_come_back() -> None:
    admission = Admission(max_queued=2, max_active=1)
    admission.enter(0.0)
    admission.started()
    for now_s in (1.0, 2.0, 3.0, 4.0):
        admission.enter(now_s)
        admission.started()
        admission.ended(True, now_s)
    assert not admission.may_start
    admission.enter(5.0)
    admission.enter(5.0)
    with pytest.raises(Overloaded) as refused:
        admission.enter(5.0)
    assert refused.value.retry_after_s == 5.0
    admission.ended(False, 6.0)
    admission.enter(6.0)
    assert (admission.queued, admission.active) == (2, 1)


def test_prompt_over_the_context_names_both_numbers() -> None:
    assert fit_context(90, SamplingParams(), 100).max_tokens == 10
    assert fit_context(90, SamplingParams(max_tokens=10), 100).max_tokens == 10
    with pytest.raises(PromptTooLong, match=r"100 tokens.*the prompt has 100"):
        fit_context(100, SamplingParams(), 100)
    with pytest.raises(PromptTooLong, match=r"100 tokens.*101 tokens were requested.*90 in the prompt"):
        fit_context(90, SamplingParams(max_tokens=11), 100)


def test_ready_needs_a_pair_and_a_recent_hand_off() -> None:
    readiness = Readiness(canary_interval_s=5.0)
    prefill, decode = WorkerLoad(A, Role.PREFILL, 1), WorkerLoad(B, Role.DECODE, 1)
    assert "No prefill worker" in readiness.verdict([], False, 0.0).reason
    assert "No decode worker" in readiness.verdict([prefill], False, 0.0).reason
    assert "No hand-off" in readiness.verdict([prefill, decode], False, 0.0).reason
    readiness.handoff_landed(10.0)
    assert readiness.verdict([prefill, decode], False, 24.0).ready
    assert readiness.verdict([WorkerLoad(A, Role.MIXED, 1)], False, 24.0).ready
    assert not readiness.verdict([prefill, decode], False, 26.0).ready
    assert not readiness.verdict([prefill, decode], True, 11.0).ready
    decode.heard(ReportedLoad(stalled_s=30.0), 11.0)
    assert not readiness.verdict([prefill, decode], False, 11.0).ready
    assert readiness.canary_due(15.0)
    assert not readiness.canary_due(14.0)


def test_tokens_gather_only_while_the_router_is_busy() -> None:
    pacer = Pacer()
    pacer.observe(0.5, 0.0)
    assert pacer.hold_s == 0.0
    for _ in range(100):
        pacer.observe(0.95, 0.0)
    assert pacer.hold_s == LONGEST_HOLD_S
    pacer.observe(0.7, 0.0)
    assert pacer.hold_s == LONGEST_HOLD_S
    for _ in range(100):
        pacer.observe(0.1, 0.0)
    assert pacer.hold_s == 0.0
    pacer.observe(0.1, 0.05)
    assert pacer.hold_s == 0.0
    pacer.observe(0.5, 0.05)
    assert pacer.hold_s > 0.0
