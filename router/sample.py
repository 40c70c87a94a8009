"""Pure: one sample of a request: its tokens in order, its text, and what its reader has not had yet."""

from collections.abc import Sequence

from router.request import Chunk
from router.text_stream import TextStream
from tandem.ids import LegId
from tandem.sampling import FinishReason, TokenLogprob


class Sample:
    """Tokens of one sample; each index enters once and leaves once, in order.

    `leg_id` is the leg that writes it, None once it has ended. Tokens before `resume_from` are not emitted:
    the reader of a resumed request has them. Without a `text` nobody reads: a simulated request.
    """

    __slots__ = (
        "_emitted",
        "_logprobs",
        "_pending_text",
        "_text",
        "failures",
        "finish",
        "finish_emitted",
        "index",
        "leg_id",
        "overloads",
        "resume_from",
        "stop_string",
        "stop_token_id",
        "tokens",
    )

    def __init__(self, index: int, text: TextStream | None, resume_from: int = 0) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.leg_id: LegId | None = None
        self.finish: FinishReason | None = None
        self.finish_emitted = False
        self.stop_string: str | None = None
        self.stop_token_id: int | None = None
        self.resume_from = resume_from
        self.failures = 0
        self.overloads = 0
        self._text = text
        self._emitted = resume_from
        self._pending_text: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    def append(self, token_id: int, logprob: TokenLogprob | None, stop_token: bool) -> bool:
        """Takes the token of the next index; returns whether a stop string ended the sample with it."""
        if self._text is None:
            self.tokens.append(token_id)
            return False
        shown, match = self._text.push_stop_token(token_id) if stop_token else self._text.push(token_id)
        if len(self.tokens) >= self.resume_from:
            if shown:
                self._pending_text.append(shown)
            if logprob is not None:
                self._logprobs.append(logprob)
        self.tokens.append(token_id)
        if match is None:
            return False
        self.finish = FinishReason.STOP
        self.stop_string = match.stop_string
        return True

    def extend(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], ends_in_stop_token: bool
    ) -> bool:
        """Takes the tokens of the next indices up to a stop string; returns whether one ended the sample."""
        if self._text is None:
            self.tokens.extend(token_ids)
            return False
        last = len(token_ids) - 1
        for at, token_id in enumerate(token_ids):
            logprob = logprobs[at] if logprobs else None
            if self.append(token_id, logprob, at == last and ends_in_stop_token):
                return True
        return False

    def end(self, finish: FinishReason, stop_token_id: int | None) -> None:
        """The sample ended with its last token; what was held back is shown, and may end in a stop string."""
        shown, match = self._text.finish() if self._text is not None else ("", None)
        if shown:
            self._pending_text.append(shown)
        self.finish = finish
        self.stop_token_id = stop_token_id
        if match is not None:
            self.finish = FinishReason.STOP
            self.stop_string, self.stop_token_id = match.stop_string, None

    def prime(
        self, token_ids: Sequence[int], end_ids: frozenset[int], max_tokens: int, min_tokens: int
    ) -> None:
        """Takes tokens that the reader of a resumed request has; they may have ended the sample already."""
        for token_id in token_ids:
            may_end = len(self.tokens) >= min_tokens and token_id in end_ids
            if self.append(token_id, None, stop_token=may_end):
                return
            if may_end:
                return self.end(FinishReason.STOP, token_id)
            if len(self.tokens) >= max_tokens:
                return self.end(FinishReason.LENGTH, None)

    def take_chunk(self) -> Chunk | None:
        """What the reader has not had yet; None if there is nothing."""
        news = len(self.tokens) > self._emitted
        ends = self.finish is not None and not self.finish_emitted
        if not news and not ends:
            return None
        first = self._emitted
        self._emitted = max(first, len(self.tokens))
        chunk = Chunk(
            self.index,
            first,
            tuple(self.tokens[first:]),
            "".join(self._pending_text),
            tuple(self._logprobs),
            self.finish,
            self.stop_string if ends else None,
            self.stop_token_id if ends else None,
        )
        self._pending_text.clear()
        self._logprobs.clear()
        self.finish_emitted = self.finish is not None
        return chunk
