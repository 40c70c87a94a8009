"""Pure: the bodies of OpenAI's API as we take them, with vLLM's extras; unknown fields are ignored.

What we can't do is refused by name, never silently dropped.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.validation import check_sampling
from tandem.errors import InvalidRequest, Unsupported
from tandem.sampling import SamplingParams

MAX_PROMPTS = 64
COMPLETION_MAX_TOKENS = 16

REFUSED_BY_BOTH: Mapping[str, Sequence[Any]] = MappingProxyType(
    {
        "allowed_token_ids": ([],),
        "bad_words": ([],),
        "length_penalty": (1, 1.0),
        "logits_processors": ([],),
        "prompt_logprobs": (),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "structured_outputs": (),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
    }
)
"""Fields of vLLM's that change the answer and that we don't do, with the values that change nothing."""

REFUSED_PREFIX = "guided_"
"""vLLM's older names of structured outputs all begin so."""


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class SharedBody(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = None
    slo_class: str | None = None

    prompt_field: ClassVar[str] = "prompt"
    """What the prompt is called, for messages."""
    answer_prefix: ClassVar[str] = "cmpl"
    """How ids of answers begin."""

    _refused: ClassVar[Mapping[str, Sequence[Any]]] = {}

    def refuse_unsupported(self, raw: Mapping[str, Any]) -> None:
        """Raises Unsupported for a field that asks for something we don't do, else InvalidRequest."""
        for name, value in raw.items():
            known = name in self._refused or name.startswith(REFUSED_PREFIX)
            if known and value is not None and value not in self._refused.get(name, ()):
                raise Unsupported(f"{name[:64]} is not supported with this value.", name[:64])
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true.", "stream_options")

    @classmethod
    def refused_fields(cls) -> tuple[str, ...]:
        """Names of the fields that are refused unless their value changes nothing."""
        return tuple(cls._refused)

    def sampling(self, vocabulary_tokens: int, **own: Any) -> SamplingParams:
        """Checked parameters; `own` are those that bodies name differently. Raises InvalidRequest."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "n": self.n,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "include_stop": self.include_stop_str_in_output,
            "seed": self._seed(),
            "stop": _stops(self.stop),
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "logit_bias": _biases(self.logit_bias),
            **own,
        }
        params = SamplingParams(**{name: value for name, value in given.items() if value is not None})
        check_sampling(params, vocabulary_tokens, self.field_name)
        return params

    def field_name(self, name: str) -> str:
        """What the client calls a field of SamplingParams."""
        return "include_stop_str_in_output" if name == "include_stop" else name

    def _seed(self) -> int | None:
        """OpenAI's seeds are signed; ours are their 64 bits."""
        if self.seed is None:
            return None
        if not -(2**63) <= self.seed < 2**64:
            raise InvalidRequest(f"seed must be a 64-bit integer, not {self.seed}.", "seed")
        return self.seed % 2**64


class CompletionBody(SharedBody):
    """POST /v1/completions."""

    prompt: Any = None
    logprobs: int | None = None
    echo: bool | None = None

    _refused: ClassVar[Mapping[str, Sequence[Any]]] = MappingProxyType(
        {
            "suffix": ("",),
            "response_format": ({"type": "text"},),
            "prompt_embeds": (),
            "add_special_tokens": (True,),
            **REFUSED_BY_BOTH,
        }
    )
    best_of: int | None = None

    def params(self, vocabulary_tokens: int) -> SamplingParams:
        """Checked parameters; max_tokens is 16 unless given, as at OpenAI's. Raises InvalidRequest."""
        if self.best_of not in (None, self.n or 1):
            raise Unsupported("best_of is not supported unless it equals n.", "best_of")
        if self.echo and self.logprobs is not None:
            raise Unsupported("echo is not supported together with logprobs.", "echo")
        most = COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if self.max_tokens is None and self.min_tokens:
            most = max(most, self.min_tokens)
        return self.sampling(vocabulary_tokens, max_tokens=most, logprobs=self.logprobs)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids. Raises InvalidRequest."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given, list) and given:
            if all(_is_id(item) for item in given):
                return [given]
            if len(given) > MAX_PROMPTS:
                raise InvalidRequest(f"prompt must have at most {MAX_PROMPTS} entries.", "prompt")
            texts = all(isinstance(item, str) for item in given)
            if texts or all(isinstance(item, list) and item and all(map(_is_id, item)) for item in given):
                return list(given)
        raise InvalidRequest(
            "prompt must be a string, a list of strings, a list of token ids or a list of such; not empty.",
            "prompt",
        )


class ChatBody(SharedBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(default_factory=list)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    prompt_field: ClassVar[str] = "messages"
    answer_prefix: ClassVar[str] = "chatcmpl"
    _refused: ClassVar[Mapping[str, Sequence[Any]]] = MappingProxyType(
        {
            "response_format": ({"type": "text"},),
            "tools": ([],),
            "functions": ([],),
            "tool_choice": ("none", "auto"),
            "function_call": ("none", "auto"),
            "modalities": (["text"],),
            "audio": (),
            "prediction": (),
            "web_search_options": (),
            "echo": (False,),
            "add_special_tokens": (False,),
            "add_generation_prompt": (True,),
            "continue_final_message": (False,),
            "chat_template": (),
            "chat_template_kwargs": ({},),
            **REFUSED_BY_BOTH,
        }
    )

    def params(self, vocabulary_tokens: int) -> SamplingParams:
        """Checked parameters. Raises InvalidRequest."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed when logprobs is true.", "top_logprobs")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        given = self.max_completion_tokens
        most = self.max_tokens if given is None else given
        return self.sampling(vocabulary_tokens, max_tokens=most, logprobs=logprobs)

    def field_name(self, name: str) -> str:
        """Chat has names of its own for two fields."""
        if name == "logprobs":
            return "top_logprobs"
        if name == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return super().field_name(name)

    def turns(self) -> list[tuple[str, str]]:
        """The conversation as (role, content). Raises InvalidRequest."""
        return [_turn(message, f"messages[{at}]") for at, message in enumerate(self.messages)]


BodyT = TypeVar("BodyT", bound=SharedBody)


def read_body(kind: type[BodyT], data: bytes) -> BodyT:
    """The body of a request. Raises InvalidRequest that names the field at fault."""
    try:
        raw = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise InvalidRequest("The body must be a JSON object.")
    try:
        body = kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{field}: {first['msg']}.", field) from None
    body.refuse_unsupported(raw)
    return body


def _stops(given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("stop must be a string or a list of strings.", "stop")
    return tuple(stops)


def _biases(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    biases: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(f"logit_bias has the key {key[:32]!r}, which is no token id.", "logit_bias")
        biases[int(key)] = value
    return biases


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _turn(message: Mapping[str, Any], field: str) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise InvalidRequest(f"{field}.role must be a string.", f"{field}.role")
    if message.get("tool_calls") or message.get("function_call"):
        raise Unsupported(f"{field}: tool calls are not supported.", f"{field}.tool_calls")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "".join([_part(part, f"{field}.content[{at}]") for at, part in enumerate(content)])
    if not isinstance(content, str):
        raise InvalidRequest(f"{field}.content must be a string or a list of parts.", f"{field}.content")
    return role, content


def _part(part: Any, field: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise Unsupported(f"{field} must be a part of type text; nothing else is supported.", field)
