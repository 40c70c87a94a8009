"""Pure: a decode scheduler that can take many steps of an unchanging batch in one go, for the simulator.

All decisions are DecodeScheduler's. A run costs no more for many samples or steps than for few, because what
it does to them is only counted until somebody looks.
"""

from dataclasses import dataclass

from decode_worker.decode_leg import (
    DecodeOutcome,
    LegRecord,
    SampleInput,
    SampleRecord,
    SampleStart,
    SampleState,
)
from decode_worker.grown_tokens import TOKEN, GrownTokens
from decode_worker.scheduler import DecodeScheduler
from decode_worker.steady_batch import SteadyBatch
from engine.kv.blocks import BlockPool
from engine.leg import LegToken
from engine.step import StepPlan, StepResult
from tandem.errors import ProtocolError
from tandem.ids import LegId
from tandem.sampling import FinishReason


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Steps that change nothing but lengths: each feeds one token of each of `batch` samples.

    The first step reads the KV of `context_tokens` tokens, each later one of `batch` more. At most the last
    one ends samples.
    """

    steps: int
    batch: int
    context_tokens: int


class RunAheadScheduler(DecodeScheduler):
    """DecodeScheduler with begin_run and complete_run beside schedule and complete.

    While a run is in flight every other method may be called as while a plan is in flight, after `advance`
    said how many of its steps are over.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch: int,
        max_waiting: int,
        context_tokens: int,
        watermark_blocks: int = 0,
    ) -> None:
        """See DecodeScheduler; no token that is drawn is an end token."""
        super().__init__(
            pool,
            max_batch=max_batch,
            max_waiting=max_waiting,
            context_tokens=context_tokens,
            eos_ids=(),
            watermark_blocks=watermark_blocks,
        )
        self._steady = SteadyBatch(pool, context_tokens)
        self._run: DecodeRun | None = None
        self._run_taken = 0
        self._unsteady: list[SampleRecord] = []
        self._leaving: list[SampleRecord] = []

    def begin_run(self) -> DecodeRun | None:
        """The longest run from here, now in flight; None when the next step needs schedule.

        ProtocolError while a plan or a run is in flight.
        """
        self._refuse_in_flight()
        self._unsteady = [sample for sample in self._unsteady if not self._enter(sample)]
        if self._unsteady or not self._running:
            return None
        steps = self._steady.sums.steps_with_blocks(self._pool.free_blocks, self._steady.steps_to_end())
        if steps == 0:
            return None
        self._pool.promise(self._steady.sums.growth_next())
        self._run = DecodeRun(steps, self._steady.sums.count, self._steady.sums.context_tokens)
        self._run_taken = 0
        self._in_flight = list(self._running)
        return self._run

    def advance(self, taken: int) -> None:
        """So many steps of the run in flight are over, counted from its start, and the next has begun.

        ProtocolError when the run has no such next step.
        """
        if self._run is None or not self._run_taken <= taken < self._run.steps:
            raise ProtocolError(f"no run is in flight that can have taken {taken} steps and go on")
        if taken > self._run_taken:
            steps = taken - self._run_taken
            self._pool.promise(self._steady.sums.growth(steps + 1) - self._steady.sums.growth_next())
            self._steady.sums.take(steps)
            self._run_taken = taken

    def steps_possible(self) -> int:
        """Steps after which the run in flight must end at the latest, counted from its start.

        Fewer than planned when blocks were given to others meanwhile. ProtocolError without a run.
        """
        if self._run is None:
            raise ProtocolError("no run is in flight")
        left = self._run.steps - self._run_taken
        in_flight = self._steady.sums.growth_next()
        free_after = self._pool.free_blocks + in_flight
        if self._steady.sums.growth(left) <= free_after:
            return self._run.steps
        return self._run_taken + 1

    def complete_run(self, taken: int) -> DecodeOutcome:
        """The run ends after so many steps; the outcome holds the last token of each sample that ended.

        Samples that were cancelled meanwhile leave. ProtocolError when the run is shorter.
        """
        if self._run is None or not self._run_taken < taken <= self._run.steps:
            raise ProtocolError(f"no run of {taken} steps is in flight")
        self.advance(taken - 1)
        self._steady.sums.take(1)
        self._run, self._in_flight = None, []
        ended = [sample for sample in self._steady.ending() if sample.state is SampleState.RUNNING]
        tokens: list[LegToken] = []
        for sample in sorted([*ended, *self._leaving], key=lambda sample: sample.rank):
            if sample.state is SampleState.LEAVING:
                self._end_sample(sample, SampleInput.STEP_DONE)
            else:
                self._end_sample(sample, SampleInput.FINISH)
                tokens.append(_last_token(sample))
        self._leaving = []
        return DecodeOutcome(tuple(tokens), self._take_dropped())

    def schedule(self, now_s: float) -> StepPlan | None:
        """See DecodeScheduler. ProtocolError while a run is in flight, too."""
        self._refuse_in_flight()
        for sample in self._running:
            self._steady.leave(sample)
        self._unsteady = list(self._running)
        return super().schedule(now_s)

    def complete(self, result: StepResult, now_s: float) -> DecodeOutcome:
        """See DecodeScheduler."""
        outcome = super().complete(result, now_s)
        self._leaving = []
        self._unsteady = list(self._running)
        return outcome

    def drawn(self, leg_id: LegId) -> dict[int, int]:
        """Output tokens of each sample of a leg in the batch, by sample index."""
        prompt_tokens = self._legs[leg_id].leg.prompt_tokens
        samples = self._legs[leg_id].samples
        return {sample.sample_index: self._steady.length(sample) - prompt_tokens for sample in samples}

    def queue_lengths(self) -> tuple[int, int]:
        """Legs that are not in the batch, and samples that are."""
        return len(self._arrivals), len(self._running)

    def _refuse_in_flight(self) -> None:
        if self._plan is not None or self._run is not None:
            raise ProtocolError("a step is in flight")

    def _enter(self, sample: SampleRecord) -> bool:
        """Whether nothing is in the way of runs: the sample is steady, or it is gone."""
        return sample.state is SampleState.ENDED or self._steady.join(sample)

    def _tokens_of(self, record: LegRecord, start: SampleStart) -> GrownTokens:
        return GrownTokens(record.leg.token_ids, len(start.token_ids))

    def _join(self, record: LegRecord | None) -> bool:
        joined = super()._join(record)
        if record is not None:
            self._unsteady += record.samples
        return joined

    def _stop_sample(self, sample: SampleRecord) -> None:
        super()._stop_sample(sample)
        if sample.state is SampleState.LEAVING and sample not in self._leaving:
            self._leaving.append(sample)

    def _end_sample(self, sample: SampleRecord, happened: SampleInput) -> None:
        self._steady.leave(sample)
        super()._end_sample(sample, happened)


def _last_token(sample: SampleRecord) -> LegToken:
    leg_id, index = sample.record.leg.leg_id, sample.output_index - 1
    return LegToken(leg_id, sample.sample_index, index, TOKEN, None, FinishReason.LENGTH, None)
