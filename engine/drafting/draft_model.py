"""Edge: guesses by a smaller model with the same tokenizer, which decodes ahead of the large one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engine.contract import StepRunner
from engine.drafting.draft import Draft, Proposal
from engine.drafting.held_kv import HeldKv, HeldSequence
from engine.drafting.rejection import GuessedWeights
from engine.drafting.runner_drafter import GrownSequence
from engine.kv.blocks import BlockPool
from engine.step import SampleRequest, SequenceSlice, StepPlan


@dataclass(slots=True)
class _Drafting:
    """One sequence while guesses are made for it; `tokens` are its own and the guesses so far."""

    sequence: GrownSequence
    held: HeldSequence
    tokens: list[int]


class DraftModel:
    """RunnerDrafter over the runner of a smaller model, whose KV lies in a pool of its own.

    Guesses are drawn with the random numbers that the large model will use, so that equal distributions give
    equal tokens; when `guessed` is given, its sampler uses others and keeps what they were drawn from.
    """

    def __init__(
        self,
        runner: StepRunner,
        pool: BlockPool,
        *,
        context_tokens: int,
        vocabulary_tokens: int,
        chunk_tokens: int,
        guessed: GuessedWeights | None = None,
        on_close: Callable[[], None],
    ) -> None:
        """Both models know `vocabulary_tokens`; the small one reads at most `chunk_tokens` tokens a step."""
        self._runner = runner
        self._kv = HeldKv(pool)
        self._context_tokens = context_tokens
        self._vocabulary_tokens = vocabulary_tokens
        self._chunk_tokens = chunk_tokens
        self._guessed = guessed
        self._on_close = on_close

    def close(self) -> None:
        """Gives the small model's memory back."""
        self._on_close()

    def propose(self, sequences: Sequence[GrownSequence]) -> list[Proposal]:
        """See RunnerDrafter. A sequence whose tokens have yet to be read gets no guesses meanwhile."""
        if self._guessed is not None:
            self._guessed.guesses.clear()
        keys = {grown.request.key for grown in sequences}
        started = [one for grown in sequences if (one := self._start(grown, keys)) is not None]
        guessing = self._read(started)
        while guessing:
            self._guess(guessing)
            guessing = [one for one in guessing if self._goes_on(one)]
        return [
            Proposal(one.sequence.request.key, one.sequence.tokens, Draft(tuple(guesses)))
            for one in started
            if (guesses := one.tokens[one.sequence.tokens :])
        ]

    def _start(self, grown: GrownSequence, keys: set[int]) -> _Drafting | None:
        """Finds what is known of a sequence; None if it has no room or tokens that the small model lacks."""
        request = grown.request
        tokens = [*request.tokens, *grown.drawn]
        if len(tokens) + request.limit > self._context_tokens or max(tokens) >= self._vocabulary_tokens:
            return None
        held = self._kv.resume(request.key, len(request.tokens), len(tokens))
        if not self._kv.cover(request.key, len(tokens) + request.limit, keys):
            self._kv.forget(request.key)
            return None
        known = held.computed - len(held.guesses)
        for guess, token_id in zip(held.guesses, tokens[known:-1], strict=False):
            if guess != token_id:
                break
            known += 1
        held.computed, held.guesses = known, []
        return _Drafting(grown, held, tokens)

    def _read(self, started: Sequence[_Drafting]) -> list[_Drafting]:
        """Feeds a part of what is long; returns the sequences of which the rest fits into the next pass."""
        left = self._chunk_tokens
        ready: list[_Drafting] = []
        slices: list[SequenceSlice] = []
        for one in started:
            start = one.held.computed
            count = min(len(one.tokens) - start, left)
            left -= count
            if start + count == len(one.tokens):
                ready.append(one)
            elif count:
                part = tuple(one.tokens[start : start + count])
                slices.append(SequenceSlice(part, start, tuple(one.held.table), ()))
                one.held.computed += count
        if slices:
            self._runner.run(StepPlan(0, tuple(slices)))
        return ready

    def _guess(self, guessing: Sequence[_Drafting]) -> None:
        """One more guess for each sequence."""
        slices = tuple(
            SequenceSlice(
                tuple(one.tokens[one.held.computed :]),
                one.held.computed,
                tuple(one.held.table),
                (self._request(one),),
            )
            for one in guessing
        )
        drawn = {token.key: token.token_id for token in self._runner.run(StepPlan(0, slices)).tokens}
        for one in guessing:
            one.held.computed = len(one.tokens)
            one.held.guesses = one.tokens[one.sequence.tokens :]
            # A row without finite logits draws nothing: as if the small model knew no such token.
            one.tokens.append(drawn.get(one.sequence.request.key, self._vocabulary_tokens))

    def _goes_on(self, one: _Drafting) -> bool:
        if one.tokens[-1] >= self._vocabulary_tokens:
            one.tokens.pop()
            return False
        return len(one.tokens) - one.sequence.tokens < one.sequence.request.limit

    def _request(self, one: _Drafting) -> SampleRequest:
        request = one.sequence.request
        return SampleRequest(
            key=request.key,
            sample_index=request.sample_index,
            output_index=len(one.tokens) - request.prompt_tokens,
            params=replace(request.params, logprobs=None),
            history=tuple(one.tokens) if request.params.needs_history else (),
            prompt_tokens=request.prompt_tokens,
        )
