"""Pure: OpenAI's JSON, built from a request's updates: whole answers, stream chunks, errors."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from router.request import Chunk, TokenUsage
from tandem.errors import (
    DuplicateRequest,
    InvalidRequest,
    NotReady,
    Overloaded,
    PromptTooLong,
    TandemError,
    UnknownModel,
    Unsupported,
)
from tandem.sampling import FinishReason, TokenLogprob

FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.CANCELLED: "stop"}

CODES: Mapping[type[TandemError], str] = {
    InvalidRequest: "invalid_value",
    PromptTooLong: "context_length_exceeded",
    Unsupported: "unsupported_parameter",
    UnknownModel: "model_not_found",
    Overloaded: "rate_limit_exceeded",
    NotReady: "service_unavailable",
    DuplicateRequest: "duplicate_request",
}
"""OpenAI's names where it has one; an error that is not here has its gRPC code in lower case."""

STATUS_CODES: Mapping[int, str] = {
    404: "unknown_url",
    405: "method_not_supported",
    408: "request_timeout",
    413: "request_too_large",
    500: "internal_error",
}
"""Codes of answers that no error of ours stands behind."""

ERROR_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


def error_json(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object; without a code it takes the status's."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    named = STATUS_CODES.get(status) if code is None else code
    return {"error": {"message": message, "type": kind, "param": param, "code": named}}


def error_json_of(error: TandemError) -> dict[str, Any]:
    """The error object of one of our errors."""
    param = error.field or None if isinstance(error, InvalidRequest) else None
    if isinstance(error, UnknownModel):
        param = "model"
    code = CODES.get(type(error), error.grpc_code.lower())
    return error_json(error.http_status, str(error), param, code)


def error_headers_of(error: TandemError) -> dict[str, str]:
    """Retry-After where it makes sense."""
    return {} if error.retry_after_s is None else {"retry-after": str(math.ceil(error.retry_after_s))}


@dataclass(slots=True)
class UsageSum:
    """Usage over all prompts of a call."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, usage: TokenUsage) -> None:
        """One prompt is finished."""
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        self.cached_tokens += usage.cached_tokens

    def json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Choice:
    """What has come of one choice so far; `echo` is the prompt's text where it stands before the answer."""

    index: int
    echo: str = ""
    text: list[str] = field(default_factory=list)
    characters: int = 0
    logprobs: list[Mapping[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class AnswerFormat:
    """How completions (`chat` False) and chat completions write tokens down.

    `logprobs` is the number of alternatives asked for, None for none at all.
    """

    def __init__(
        self,
        chat: bool,
        answer_id: str,
        model: str,
        created: int,
        logprobs: int | None,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self._chat = chat
        self._logprobs = logprobs
        self._token_bytes = token_bytes
        self._head = {"id": answer_id, "created": created, "model": model}
        self._started: set[int] = set()

    def add(self, choice: Choice, chunk: Chunk) -> None:
        """Takes a chunk into an answer that is sent whole."""
        choice.text.append(chunk.text)
        if chunk.logprobs:
            choice.logprobs.append(self._logprobs_json(chunk.logprobs, choice.characters))
        choice.characters += len(chunk.text)
        if chunk.finish is not None:
            choice.finish_reason = FINISH[chunk.finish]
            choice.stop_reason = chunk.stop_string if chunk.stop_string is not None else chunk.stop_token_id

    def whole(self, choices: Sequence[Choice], usage: UsageSum) -> dict[str, Any]:
        """The answer when everything has come."""
        kind = "chat.completion" if self._chat else "text_completion"
        return {
            **self._head,
            "object": kind,
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage.json(),
        }

    def stream_chunks(self, choice: Choice, chunk: Chunk, with_usage: bool) -> list[dict[str, Any]]:
        """The events of a chunk: in a chat the role comes first and the finish last, each alone."""
        more = {"usage": None} if with_usage else {}
        if not self._chat:
            return [self._event([self._stream_choice(choice, chunk)], more)]
        events = []
        if choice.index not in self._started:
            self._started.add(choice.index)
            start = {"index": choice.index, "logprobs": None, "finish_reason": None}
            events.append(self._event([{**start, "delta": {"role": "assistant", "content": ""}}], more))
        if chunk.text or chunk.logprobs:
            events.append(self._event([self._stream_choice(choice, replace(chunk, finish=None))], more))
        if chunk.finish is not None:
            end = self._stream_choice(choice, replace(chunk, text="", logprobs=()))
            events.append(self._event([{**end, "delta": {}}], more))
        return events

    def _stream_choice(self, choice: Choice, chunk: Chunk) -> dict[str, Any]:
        """One choice of one event; what is echoed comes with the first. `choice` only keeps count here."""
        logprobs = self._logprobs_json(chunk.logprobs, choice.characters) if chunk.logprobs else None
        choice.characters += len(chunk.text)
        body: dict[str, Any] = {"index": choice.index, "logprobs": logprobs, "finish_reason": None}
        if chunk.finish is not None:
            body["finish_reason"] = FINISH[chunk.finish]
            body["stop_reason"] = chunk.stop_token_id if chunk.stop_string is None else chunk.stop_string
        if self._chat:
            body["delta"] = {"content": chunk.text}
        else:
            body["text"] = choice.echo + chunk.text
            choice.echo = ""
        return body

    def usage_chunk(self, usage: UsageSum) -> dict[str, Any]:
        """The event before [DONE] when stream_options.include_usage was given."""
        return self._event([], {"usage": usage.json()})

    def _event(self, choices: list[dict[str, Any]], more: Mapping[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **more}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        logprobs = self._merged_logprobs(choice.logprobs) if self._logprobs is not None else None
        body: dict[str, Any] = {
            "index": choice.index,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._chat:
            body["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            body["text"] = choice.echo + text
        return body

    def _merged_logprobs(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = ("content",) if self._chat else ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [item for part in parts for item in part[name]] for name in names}

    def _logprobs_json(self, entries: Sequence[TokenLogprob], offset: int) -> Mapping[str, Any]:
        if self._chat:
            return {"content": [self._chat_entry(entry) for entry in entries]}
        offsets, tokens = [], []
        for entry in entries:
            token = self._text(entry.token_id)
            tokens.append(token)
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {self._text(token_id): logprob for token_id, logprob in _with_chosen(entry)}
                for entry in entries
            ],
            "text_offset": offsets,
        }

    def _chat_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._token_json(token_id, logprob) for token_id, logprob in entry.top]
        return {**self._token_json(entry.token_id, entry.logprob), "top_logprobs": top}

    def _token_json(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = self._token_bytes(token_id)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}

    def _text(self, token_id: int) -> str:
        return self._token_bytes(token_id).decode("utf-8", "replace")


def _with_chosen(entry: TokenLogprob) -> list[tuple[int, float]]:
    """The alternatives and the token itself, which is among them only if it is probable."""
    known = any(token_id == entry.token_id for token_id, _ in entry.top)
    return [*entry.top] if known else [*entry.top, (entry.token_id, entry.logprob)]
