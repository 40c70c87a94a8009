"""Pure: what one step computes, and what it gave; the messages between a scheduler and the torch thread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.drafting.draft import NO_DRAFT, Draft, DraftRequest, Proposal
from engine.kv_policies.bounded_kv import NO_DROPS, BoundedKv, KvDrops
from tandem.ids import BlockId
from tandem.sampling import SamplingParams, TokenLogprob

PENDING: Final = 0
"""Stands for a token that the step before has yet to draw; a token of every vocabulary."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One token to draw after the last of a slice's tokens, or after the one at index `row` of them.

    `key` names the sequence to its scheduler and comes back in the result. `output_index` is the index of the
    drawn token in its sample's output: with (seed, sample_index) it determines the random number.
    `history` holds prompt and output tokens when `params.needs_history`, else it is empty;
    `prompt_tokens` says how many of them are the prompt.
    `banned` are token ids that may not be drawn now (end tokens before min_tokens is reached).
    """

    key: int
    sample_index: int
    output_index: int
    params: SamplingParams
    history: Sequence[int] = ()
    prompt_tokens: int = 0
    banned: tuple[int, ...] = ()
    row: int = -1
    """Index into the slice's token_ids, negative: counted from their end."""


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """Consecutive tokens of one sequence to feed in this step.

    KV of `token_ids` is written at positions start .. start+len-1 through `block_table`, which covers all of
    them; KV of positions < start is in the cache. `samples` is empty for a prompt chunk that is not the last.
    The last tokens may be a `draft` to verify: then there is one sample after the token before them and one
    after each guess, in order. Guesses on other branches are no part of a guess's past, and its position is
    its depth's, whatever its place in the cache. `propose` asks for a new draft.
    A slice that `follows` has one token, still unknown when it is planned: what the step before draws for the
    same key. Its `token_ids` hold PENDING.
    Where KV was dropped (`bounded`), `start` and the block table count slots: positions are so many further.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[BlockId]
    samples: tuple[SampleRequest, ...]
    draft: Draft = NO_DRAFT
    propose: DraftRequest | None = None
    follows: bool = False
    bounded: BoundedKv | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that one step does: first the drops of KV and the block copies (copy-on-write), then the slices.

    Who keeps facts about the content of blocks hears of `landed` ones before the copies.
    """

    step: int
    slices: tuple[SequenceSlice, ...]
    copies: tuple[tuple[BlockId, BlockId], ...] = ()
    """(source, target) pairs."""
    landed: tuple[tuple[BlockId, int], ...] = ()
    """Blocks that others than steps wrote since the last plan, and how many tokens each holds."""
    drops: KvDrops = NO_DROPS


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token drawn for the SampleRequest of the same key, sample index and row."""

    key: int
    sample_index: int
    token_id: int
    logprob: TokenLogprob | None
    """Present when params.logprobs is not None."""
    row: int = -1


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave; `compute_s` is its duration on the torch thread."""

    step: int
    tokens: tuple[SampledToken, ...]
    compute_s: float
    proposals: tuple[Proposal, ...] = ()
