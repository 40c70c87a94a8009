"""Pure: a decode scheduler that plans the next step while one is in flight, for runners that begin it early.

Without it a GPU waits between two steps until the host has learnt the tokens, scheduled and launched.
"""

from collections.abc import Collection
from typing import Final

from decode_worker.decode_leg import (
    SAMPLE_TRANSITIONS,
    DecodeOutcome,
    SampleInput,
    SampleRecord,
    SampleState,
)
from decode_worker.scheduler import DecodeScheduler
from decode_worker.slices import following_slice
from engine.kv.blocks import BlockPool
from engine.sampling.ending import ends_by_length
from engine.step import StepPlan, StepResult
from engine.transitions import next_state
from tandem.errors import ProtocolError

_WHILE_FOLLOWING: Final = {
    SampleInput.FINISH: SampleInput.FINISH_IN_FLIGHT,
    SampleInput.STOP: SampleInput.STOP_IN_FLIGHT,
    SampleInput.STEP_DONE: SampleInput.STOP_IN_FLIGHT,
}
"""What an end means for a sample that the following step feeds."""


class PipelinedScheduler(DecodeScheduler):
    """DecodeScheduler with schedule_following beside schedule: up to two plans are in flight.

    The following plan feeds each sample what the first one draws for it. A sample that turns out to have
    ended keeps its blocks until the following step is complete; what that step draws for it is nobody's.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch: int,
        max_waiting: int,
        context_tokens: int,
        eos_ids: Collection[int],
        watermark_blocks: int = 0,
        chunk_tokens: int = 512,
    ) -> None:
        """See DecodeScheduler. Nothing is guessed: a draft would be a step behind."""
        super().__init__(
            pool,
            max_batch=max_batch,
            max_waiting=max_waiting,
            context_tokens=context_tokens,
            eos_ids=eos_ids,
            watermark_blocks=watermark_blocks,
            chunk_tokens=chunk_tokens,
        )
        self._following: StepPlan | None = None
        self._following_samples: list[SampleRecord] = []

    def schedule_following(self) -> StepPlan | None:
        """The step after the one in flight; None when it can't be planned before that one's result.

        That is when a sample joined, feeds several tokens, needs its history, or finds no free block: then
        schedule decides. ProtocolError when no plan is in flight, or a following one already.
        """
        if self._plan is None or self._following is not None:
            raise ProtocolError("a following step needs one step in flight, and no other")
        samples = [s for s in self._running if s.state is SampleState.RUNNING and not self._ends_anyway(s)]
        in_flight = {sample.key for sample in self._in_flight}
        if not samples or not all(s.key in in_flight and _can_follow(s) for s in samples):
            return None
        missing = [self._missing_blocks(sample) for sample in samples]
        if sum(missing) > self._pool.free_blocks:
            return None
        for sample, count in zip(samples, missing, strict=True):
            if count:
                # The plan in flight is read by another thread: it goes on with the list that it has.
                sample.table = [*sample.table, *self._pool.allocate(count)]
        self._steps += 1
        slices = tuple(following_slice(sample, self._eos_ids) for sample in samples)
        self._following, self._following_samples = StepPlan(self._steps, slices), samples
        return self._following

    def complete(self, result: StepResult, now_s: float) -> DecodeOutcome:
        """See DecodeScheduler; the following plan, if there is one, is the plan in flight from then on."""
        outcome = super().complete(result, now_s)
        self._plan, self._following = self._following, None
        self._in_flight, self._following_samples = self._following_samples, []
        for sample in self._in_flight:
            sample.slice_tokens = 1
        return outcome

    def _ends_anyway(self, sample: SampleRecord) -> bool:
        """Whether the token that is being drawn is the sample's last, whichever it is."""
        return ends_by_length(
            sample.record.leg.params,
            sample.output_index,
            total_tokens=len(sample.tokens) + 1,
            context_tokens=self._context_tokens,
        )

    def _missing_blocks(self, sample: SampleRecord) -> int:
        return max(0, self._pool.blocks_for(len(sample.tokens) + 1) - len(sample.table))

    def _stop_sample(self, sample: SampleRecord) -> None:
        if self._follows(sample):
            self._end_sample(sample, SampleInput.STOP)
        else:
            super()._stop_sample(sample)

    def _end_sample(self, sample: SampleRecord, happened: SampleInput) -> None:
        if self._follows(sample):
            sample.state = next_state(SAMPLE_TRANSITIONS, sample.state, _WHILE_FOLLOWING[happened])
        else:
            super()._end_sample(sample, happened)

    def _follows(self, sample: SampleRecord) -> bool:
        return any(sample is following for following in self._following_samples)


def _can_follow(sample: SampleRecord) -> bool:
    """Whether the step in flight draws a token of the sample, and the next draw needs no earlier tokens."""
    return sample.draws and not sample.record.leg.params.needs_history
