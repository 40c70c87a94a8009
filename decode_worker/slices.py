"""Pure: a sample's part of a step plan, and which of the tokens drawn for it are its output."""

from collections.abc import Collection, Sequence

from decode_worker.decode_leg import SampleRecord
from engine.drafting.draft import (
    Draft,
    DraftRequest,
    accepted_rows,
    in_place,
    row_in_slice,
    row_of_draft,
)
from engine.leg import LegToken
from engine.sampling.ending import Ending, banned_tokens
from engine.step import PENDING, SampledToken, SampleRequest, SequenceSlice


def sample_slice(sample: SampleRecord, eos_ids: Collection[int], propose: int = 0) -> SequenceSlice:
    """The sample's next tokens and its draft; asks for a new draft of at most `propose` tokens.

    Its lists are live: they change at complete and schedule only.
    """
    start, draft = sample.computed, sample.draft
    end = start + sample.slice_tokens
    token_ids = (*sample.tokens[start:end], *draft.token_ids)
    if end < len(sample.tokens):
        return SequenceSlice(token_ids, start, sample.table, ())
    requests: tuple[SampleRequest, ...] = (_request(sample, eos_ids, (), row_in_slice(draft, 0)),)
    if draft:
        guesses = range(len(draft))
        requests += tuple(
            _request(sample, eos_ids, draft.path(index), row_in_slice(draft, index + 1)) for index in guesses
        )
    request = _draft_request(sample, propose) if propose else None
    return SequenceSlice(token_ids, start, sample.table, requests, draft, request)


def following_slice(sample: SampleRecord, eos_ids: Collection[int]) -> SequenceSlice:
    """The token that the step in flight draws for a sample, and the draw after it."""
    leg, output_index = sample.record.leg, sample.output_index + 1
    request = SampleRequest(
        key=sample.key,
        sample_index=sample.sample_index,
        output_index=output_index,
        params=leg.params,
        prompt_tokens=leg.prompt_tokens,
        banned=banned_tokens(leg.params, output_index, eos_ids),
    )
    return SequenceSlice((PENDING,), len(sample.tokens), sample.table, (request,), follows=True)


def accepted_tokens(draft: Draft, drawn: Sequence[SampledToken]) -> tuple[list[SampledToken], int]:
    """The output among the tokens drawn for a sample, and how many of its guesses have KV in place."""
    if not draft:
        return list(drawn[:1]), 0
    by_row = {row_of_draft(draft, token.row): token for token in drawn}
    rows = accepted_rows(draft, {row: token.token_id for row, token in by_row.items()})
    return [by_row[row] for row in rows], in_place(rows)


def leg_token(
    sample: SampleRecord, drawn: SampledToken, output_index: int, ending: Ending | None
) -> LegToken:
    """What the router is told of a token that was drawn for a sample."""
    return LegToken(
        leg_id=sample.record.leg.leg_id,
        sample_index=sample.sample_index,
        output_index=output_index,
        token_id=drawn.token_id,
        logprob=drawn.logprob,
        finish=ending.reason if ending is not None else None,
        stop_token_id=ending.stop_token_id if ending is not None else None,
    )


def _request(
    sample: SampleRecord, eos_ids: Collection[int], guessed: tuple[int, ...], row: int
) -> SampleRequest:
    """The draw after the sample's last token and some guesses, at an index into its slice."""
    leg = sample.record.leg
    output_index = len(sample.tokens) - leg.prompt_tokens + len(guessed)
    history: Sequence[int] = ()
    if leg.params.needs_history:
        history = (*sample.tokens, *guessed) if guessed else sample.tokens
    banned = banned_tokens(leg.params, output_index, eos_ids)
    return SampleRequest(
        sample.key, sample.sample_index, output_index, leg.params, history, leg.prompt_tokens, banned, row
    )


def _draft_request(sample: SampleRecord, limit: int) -> DraftRequest:
    leg = sample.record.leg
    return DraftRequest(sample.key, sample.sample_index, sample.tokens, leg.prompt_tokens, leg.params, limit)
