"""A decode scheduler that drops KV keeps to the budget, loses no block and writes into nobody else's."""

import pytest
from hypothesis import settings

from decode_worker.bounded_scheduler import BoundedScheduler
from decode_worker.scheduler import DecodeLeg, DecodeScheduler, SampleStart
from engine.contract import LayerListener
from engine.kv.blocks import BlockPool
from engine.kv_policies.bounded_kv import KvBudget, KvDrop
from engine.step import SampledToken, SequenceSlice, StepPlan, StepResult
from tandem.ids import LegId
from tandem.sampling import SamplingParams
from tests.decode_worker.test_scheduler_memory import result_of
from tests.decode_worker.test_scheduler_stateful import (
    BATCH,
    BLOCKS,
    CONTEXT,
    EOS,
    SIZE,
    VOCABULARY,
    DecodeMachine,
)
from tests.engine.toy_runner import ToyRunner

BUDGET = KvBudget(tokens=6, window=2)


class DroppingRunner(ToyRunner):
    """A ToyRunner that drops KV, and remembers what each sequence that dropped some must still have."""

    def __init__(self, num_blocks: int, block_size: int, vocabulary: int, budget: KvBudget) -> None:
        super().__init__(num_blocks, block_size, vocabulary)
        self._budget = budget
        self._kept: dict[int, list[tuple[int, int] | None]] = {}
        self.drops = 0

    def run(self, plan: StepPlan, on_layers: LayerListener | None = None) -> StepResult:
        """Drops first; forgets sequences that ended."""
        for key in plan.drops.ended:
            self._kept.pop(key, None)
        for drop in plan.drops.drops:
            self._drop(drop)
        return super().run(plan, on_layers)

    def _drop(self, drop: KvDrop) -> None:
        """Of the old ones those with the largest chains stay: as good as any for a scheduler."""
        held = [self._slots[drop.source[at // self._size]][at % self._size] for at in range(drop.held)]
        assert None not in held
        assert drop.key not in self._kept or held == self._kept[drop.key]
        old = range(drop.held - self._budget.window)
        largest = sorted(old, key=lambda at: held[at] or (0, 0), reverse=True)
        stay = sorted(largest[: drop.keep - self._budget.window])
        kept = [held[at] for at in (*stay, *range(len(old), drop.held))]
        for at, slot in enumerate(kept):
            self._slots[drop.target[at // self._size]][at % self._size] = slot
        self._kept[drop.key] = kept
        self.drops += 1

    def _feed(self, part: SequenceSlice) -> list[SampledToken]:
        drawn = super()._feed(part)
        if part.bounded is not None and part.bounded.key in self._kept:
            places = range(part.start, part.start + len(part.token_ids))
            table = part.block_table
            self._kept[part.bounded.key] += [
                self._slots[table[at // self._size]][at % self._size] for at in places
            ]
        return drawn

    def _chain_before(self, part: SequenceSlice) -> int:
        if part.bounded is None or part.bounded.dropped == 0:
            return super()._chain_before(part)
        table, places = part.block_table, range(part.start)
        held = [self._slots[table[at // self._size]][at % self._size] for at in places]
        assert held == self._kept[part.bounded.key], "what a sequence kept is there no more"
        assert held[-1] is not None
        return held[-1][1]


class BoundedMachine(DecodeMachine):
    """Every sequence that dropped KV keeps to the budget, and what it kept is nobody else's to write."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = DroppingRunner(BLOCKS, SIZE, VOCABULARY, BUDGET)

    def scheduler(self) -> DecodeScheduler:
        return BoundedScheduler(
            self.pool,
            BUDGET,
            max_batch=BATCH,
            max_waiting=4,
            context_tokens=CONTEXT,
            eos_ids=(EOS,),
            chunk_tokens=3,
        )

    def begin_step(self) -> None:
        super().begin_step()
        if self.plan is None:
            return
        tables = {part.bounded.key: set(part.block_table) for part in self.plan.slices if part.bounded}
        for part in self.plan.slices:
            if part.bounded is not None and part.bounded.dropped:
                assert part.start + len(part.token_ids) <= BUDGET.tokens
                assert len(part.block_table) <= BUDGET.tokens // SIZE
        for drop in self.plan.drops.drops:
            assert set(drop.target) <= tables.pop(drop.key)
            others = [block for table in tables.values() for block in table]
            assert not set(drop.target) & set(others), "a drop writes another's block"
            tables[drop.key] = set(drop.target)


TestBoundedScheduler = BoundedMachine.TestCase
TestBoundedScheduler.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, derandomize=True
)


def _joined(pool: BlockPool, budget: KvBudget, prompts: list[int], samples: int = 1) -> BoundedScheduler:
    """A scheduler with a leg of so many tokens for each prompt, whose KV landed."""
    legs = BoundedScheduler(pool, budget, max_batch=8, max_waiting=8, context_tokens=4096, eos_ids=(EOS,))
    for number, tokens in enumerate(prompts):
        starts = tuple(SampleStart(index, (1,)) for index in range(samples))
        params = SamplingParams(max_tokens=500, ignore_eos=True)
        token_ids = tuple((number + 2) * 1000 + place for place in range(tokens))
        legs.add(DecodeLeg(LegId(str(number)), token_ids, tokens, starts, params, 0, 1e9), 0.0)
    for reservation in legs.reserve(0.0):
        legs.landed(reservation.leg_id, 0.0)
    return legs


def _step(legs: BoundedScheduler) -> StepPlan:
    plan = legs.schedule(0.0)
    assert plan is not None
    legs.complete(result_of(plan), 0.0)
    return plan


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("prompt", [5, 60, 64, 65, 200])
def test_a_sample_holds_no_more_than_its_budget_a_window_after_it_arrived(
    prompt: int, prefix_cache: bool
) -> None:
    pool, budget = BlockPool(64, 16, prefix_cache=prefix_cache), KvBudget(tokens=64, window=16)
    legs = _joined(pool, budget, [prompt])
    most = 0
    for step in range(300):
        plan = _step(legs)
        held = plan.slices[0].start + 1
        if step >= budget.window:
            most = max(most, held)
            assert pool.allocated_blocks == 4 or held < 64
        bounded = plan.slices[0].bounded
        dropped = 0 if bounded is None else bounded.dropped
        assert plan.slices[0].start + dropped == prompt + step, "positions go on"
        pool.check_integrity(legs.held_blocks())
    assert most == budget.tokens


def test_the_blocks_of_a_long_prompt_are_free_after_its_first_drop() -> None:
    pool, budget = BlockPool(64, 16, prefix_cache=False), KvBudget(tokens=64, window=16)
    legs = _joined(pool, budget, [640])
    assert pool.free_blocks == 24
    plans = [_step(legs) for _ in range(17)]
    assert [len(plan.drops.drops) for plan in plans] == [0] * 16 + [1]
    assert pool.free_blocks == 64 - 4
    drop = plans[-1].drops.drops[0]
    assert (drop.held, drop.keep, len(drop.source), len(drop.target)) == (656, 48, 41, 3)
    assert drop.target == drop.source[:3], "blocks of its own are used where they lie"
    assert legs.load().allocated_blocks == legs.load().referenced_blocks


def test_a_prompt_that_others_may_share_is_left_as_it_is() -> None:
    """Both samples and the prefix cache keep what they have; each sample goes on in blocks of its own."""
    pool, budget = BlockPool(64, 16), KvBudget(tokens=64, window=16)
    legs = _joined(pool, budget, [320], samples=2)
    plans = [_step(legs) for _ in range(17)]
    first, second = plans[-1].drops.drops
    assert not set(first.target) & set(first.source)
    assert not set(first.target) & set(second.target)
    assert pool.allocated_blocks == 2 * 4
    again = pool.match(tuple(2000 + place for place in range(320)), whole=True)
    assert again == first.source[:20]
    pool.release(again)


def test_a_cached_prompt_that_fills_the_pool_gives_its_own_blocks_up() -> None:
    """There is no block to move to, and nobody else to give way; the sample must not be dropped for it."""
    pool, budget = BlockPool(20, 16), KvBudget(tokens=160, window=16)
    legs = _joined(pool, budget, [300])
    for _ in range(18):
        _step(legs)
        pool.check_integrity(legs.held_blocks())
    assert pool.allocated_blocks == 10
    assert pool.match(tuple(2000 + place for place in range(300)), whole=True) == ()


def test_what_dropped_kv_is_never_offered_as_a_prefix() -> None:
    pool, budget = BlockPool(64, 16), KvBudget(tokens=64, window=16)
    legs = _joined(pool, budget, [20])
    for _ in range(60):
        _step(legs)
    legs.cancel(LegId("0"))
    assert pool.allocated_blocks == 0
    cached = pool.match((*(2000 + place for place in range(20)), *[1] * 60), whole=True)
    assert len(cached) == 1, "only the block that landed, whose KV is exact"
    pool.release(cached)


def test_a_sample_that_ends_is_told_to_the_runner_once() -> None:
    legs = _joined(BlockPool(64, 16), KvBudget(tokens=64, window=16), [100, 100])
    keys = [part.samples[0].key for part in _step(legs).slices]
    legs.cancel(LegId("0"))
    assert [_step(legs).drops.ended for _ in range(2)] == [(keys[0],), ()]
