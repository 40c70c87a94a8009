"""Pure: a decode scheduler whose samples hold KV of a bounded number of tokens (MorphKV).

It says when KV is dropped and into which blocks what stays goes; the torch thread chooses which tokens stay.
What a sample has dropped is nobody's: another worker that goes on with it reads its tokens anew.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from decode_worker.decode_leg import DecodeOutcome, SampleInput, SampleRecord
from decode_worker.sample_blocks import grow
from decode_worker.scheduler import DecodeScheduler
from engine.kv.blocks import BlockPool
from engine.kv_policies.bounded_kv import KvBudget, KvDrop, KvDrops
from engine.kv_policies.bounded_sequence import BoundedSequence
from engine.step import SequenceSlice, StepPlan, StepResult
from tandem.ids import BlockId


class BoundedScheduler(DecodeScheduler):
    """DecodeScheduler that drops KV beyond a budget and frees its blocks.

    A sample may hold more than the budget until a window of its tokens was fed here one by one: it arrives
    with all of its prompt, and only its own tokens can say what of it they need.
    """

    def __init__(
        self,
        pool: BlockPool,
        budget: KvBudget,
        *,
        max_batch: int,
        max_waiting: int,
        context_tokens: int,
        eos_ids: Collection[int],
        watermark_blocks: int = 0,
        chunk_tokens: int = 512,
    ) -> None:
        """See DecodeScheduler. Nothing is guessed: guesses are not fed one by one."""
        super().__init__(
            pool,
            max_batch=max_batch,
            max_waiting=max_waiting,
            context_tokens=context_tokens,
            eos_ids=eos_ids,
            watermark_blocks=watermark_blocks,
            chunk_tokens=chunk_tokens,
        )
        self._budget = budget
        self._bounded: dict[int, BoundedSequence] = {}
        self._planned: dict[int, tuple[KvDrop, list[BlockId]]] = {}
        self._leaving: list[BlockId] = []
        self._ended: list[int] = []

    def schedule(self, now_s: float) -> StepPlan | None:
        """See DecodeScheduler; the plan's drops are those of the samples in it."""
        plan = super().schedule(now_s)
        if plan is None:
            return None
        drops = []
        for sample in self._in_flight:
            if sample.key in self._planned:
                drop, leaving = self._planned.pop(sample.key)
                drops.append(drop)
                self._leaving += leaving
        slices = tuple(map(self._slice_of, self._in_flight, plan.slices))
        self._plan = replace(plan, slices=slices, drops=KvDrops(tuple(drops), tuple(self._ended)))
        self._ended = []
        return self._plan

    def complete(self, result: StepResult, now_s: float) -> DecodeOutcome:
        """See DecodeScheduler; blocks that a drop has left are free from then on."""
        fed = [(self._bounded[s.key], s.computed, s.slice_tokens) for s in self._in_flight]
        outcome = super().complete(result, now_s)
        for bounded, computed, tokens in fed:
            bounded.fed(self._budget, computed, tokens)
        leaving, self._leaving = self._leaving, []
        self._pool.release(leaving)
        return outcome

    def held_blocks(self) -> list[Sequence[BlockId]]:
        """See DecodeScheduler; with the blocks that drops still read."""
        planned = [leaving for _, leaving in self._planned.values()]
        return [*super().held_blocks(), *planned, self._leaving]

    def _grow(self, sample: SampleRecord) -> None:
        bounded = self._bounded.setdefault(sample.key, BoundedSequence(sample.key))
        fed = min(len(sample.tokens) - sample.computed, self._chunk_tokens)
        planned = bounded.drop(self._pool, self._budget, sample.table, sample.computed, fed)
        if planned is not None:
            self._planned[sample.key] = planned
        grow(self._pool, sample, self._chunk_tokens, bounded.dropped)

    def _slice_of(self, sample: SampleRecord, part: SequenceSlice) -> SequenceSlice:
        bounded = self._bounded[sample.key]
        note = bounded.note(self._budget, sample.computed, sample.slice_tokens)
        return replace(part, start=sample.computed - bounded.dropped, bounded=note)

    def _keep_prefix(self, sample: SampleRecord) -> None:
        """Blocks from which KV was dropped hold no prefix."""
        bounded = self._bounded.get(sample.key)
        if bounded is None or bounded.dropped == 0:
            super()._keep_prefix(sample)

    def _end_sample(self, sample: SampleRecord, happened: SampleInput) -> None:
        super()._end_sample(sample, happened)
        if self._bounded.pop(sample.key, None) is not None:
            self._ended.append(sample.key)
        if sample.key in self._planned:
            self._pool.release(self._planned.pop(sample.key)[1])
