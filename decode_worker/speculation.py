"""Pure: whose drafts the next decode step verifies, and what became of them."""

from collections.abc import Sequence

from decode_worker.decode_leg import SampleRecord
from decode_worker.sample_blocks import add_draft
from engine.drafting.contract import Drafter, RunnerDrafts
from engine.drafting.controller import Offer, SpeculationController
from engine.drafting.draft import Draft
from engine.drafting.ngram import NgramDrafter
from engine.kv.blocks import BlockPool
from engine.step import StepPlan, StepResult
from tandem.worker_config import WorkerConfig


class Speculation:
    """Owns the drafter and the controller of one decode scheduler."""

    def __init__(self, drafter: Drafter, controller: SpeculationController, max_tokens: int) -> None:
        """At most `max_tokens` guesses for a sequence in a step."""
        self._drafter = drafter
        self._controller = controller
        self._max_tokens = max_tokens

    @property
    def asked_tokens(self) -> int:
        """Guesses that a plan asks of the runner for each sequence; 0 if they are not made there."""
        return self._max_tokens if self._drafter.asks_runner else 0

    def add_drafts(
        self, pool: BlockPool, samples: Sequence[SampleRecord], context_tokens: int, keep_free: int
    ) -> None:
        """Lets the next slices of samples end with guesses, in blocks that are free but `keep_free`."""
        offers = {
            sample.key: Offer(sample.key, self._drafter.propose(sample.key, sample.tokens, limit))
            for sample in samples
            if sample.draws and (limit := self._limit(sample, context_tokens)) > 0
        }
        lengths = self._controller.lengths(len(samples), tuple(offers.values()))
        chosen = dict(zip(offers, lengths, strict=True))
        for sample in samples:
            if count := chosen.get(sample.key, 0):
                add_draft(pool, sample, offers[sample.key].draft.first(count), keep_free)

    def step_done(self, plan: StepPlan, result: StepResult) -> None:
        """Takes the proposals of a step, and its duration if it only decoded."""
        self._drafter.learn(result.proposals)
        guesses = sum(len(part.draft) for part in plan.slices)
        if sum(len(part.token_ids) for part in plan.slices) == len(plan.slices) + guesses:
            self._controller.observe_step(len(plan.slices), guesses, result.compute_s)

    def verified(self, sample: SampleRecord, draft: Draft, accepted: int) -> None:
        """Takes the fate of a sample's draft."""
        depth = max(draft.depths(), default=0)
        self._controller.observe_draft(sample.key, depth, accepted)

    def forget(self, sample: SampleRecord) -> None:
        """The sample ended."""
        self._drafter.forget(sample.key)
        self._controller.forget(sample.key)

    def _limit(self, sample: SampleRecord, context_tokens: int) -> int:
        """Guesses that could still become output: the step draws one token more than it accepts."""
        limit = min(self._max_tokens, context_tokens - len(sample.tokens) - 1)
        max_tokens = sample.record.leg.params.max_tokens
        return limit if max_tokens is None else min(limit, max_tokens - sample.output_index - 1)


def speculation_of(config: WorkerConfig) -> Speculation | None:
    """What a worker's settings say about guessing tokens."""
    wanted = config.speculative
    if wanted is None:
        return None
    drafter: Drafter = RunnerDrafts()
    if wanted.method == "ngram":
        drafter = NgramDrafter(wanted.min_ngram, wanted.max_ngram)
    return Speculation(drafter, SpeculationController(), wanted.tokens)
