"""Pure: when a sample ends, as far as token ids decide it; stop strings are the router's matter."""

from collections.abc import Collection
from dataclasses import dataclass

from tandem.sampling import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sample ended; `stop_token_id` is the end-of-sequence or stop token, None for LENGTH."""

    reason: FinishReason
    stop_token_id: int | None = None


_LENGTH = Ending(FinishReason.LENGTH)


def banned_tokens(params: SamplingParams, output_index: int, eos_ids: Collection[int]) -> tuple[int, ...]:
    """Token ids that may not be drawn at `output_index`: all that would end the sample before min_tokens."""
    if output_index >= params.min_tokens:
        return ()
    ends = set(params.stop_token_ids)
    if not params.ignore_eos:
        ends.update(eos_ids)
    return tuple(sorted(ends))


def ends_by_length(
    params: SamplingParams, output_index: int, *, total_tokens: int, context_tokens: int
) -> bool:
    """Whether the token at `output_index` is the last, whichever it is; see ending_after."""
    last = params.max_tokens is not None and output_index + 1 >= params.max_tokens
    return last or total_tokens >= context_tokens


def ending_after(
    params: SamplingParams,
    token_id: int,
    output_index: int,
    *,
    total_tokens: int,
    context_tokens: int,
    eos_ids: Collection[int],
) -> Ending | None:
    """How the sample ends with this token, or None if it goes on.

    `output_index` is the token's index in the output, `total_tokens` counts prompt and output with it. A stop
    wins over a length reached with the same token.
    """
    if output_index >= params.min_tokens:
        is_end = token_id in params.stop_token_ids or (not params.ignore_eos and token_id in eos_ids)
        if is_end:
            return Ending(FinishReason.STOP, token_id)
    over = ends_by_length(params, output_index, total_tokens=total_tokens, context_tokens=context_tokens)
    return _LENGTH if over else None
