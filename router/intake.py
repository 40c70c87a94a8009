"""Edge: turns what clients send into tokenised requests: prompts are read once, here."""

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from engine.models.tokenizer import Tokenizer
from router.admission import fit_context
from router.request import GenerationRequest
from router.served_model import ServedModel
from router.validation import (
    check_chat,
    check_length,
    check_model,
    check_priority,
    check_prompt_ids,
    check_request_id,
    check_sampling,
    derived_seed,
    resume_points,
    slo_class_name,
    timeout_from,
)
from tandem.errors import InvalidRequest
from tandem.ids import RequestId
from tandem.sampling import SamplingParams
from tandem.v1 import inference_pb2 as pb
from tandem.wire import sampling_from_wire

THREAD_FROM_CHARACTERS = 4096
"""Longer texts are tokenised off the event loop, one at a time."""

TEMPLATE_ROLES = MappingProxyType({"developer": "system"})
"""OpenAI's newer name of a role; chat templates know the older one."""


class Intake:
    """Reads prompts, and checks everything that a request holds."""

    def __init__(self, tokenizer: Tokenizer, model: ServedModel, clock: Callable[[], float]) -> None:
        self.model = model
        self._clock = clock
        self._tokenizer = tokenizer
        self._one_at_a_time = asyncio.Lock()
        ids = range(tokenizer.vocabulary_tokens)
        self._longest_token_bytes = max(1, *(len(tokenizer.token_bytes(token_id)) for token_id in ids))

    async def text_ids(self, text: str, field: str) -> list[int]:
        """Token ids of a text. Raises InvalidRequest when there are none."""
        if not text:
            raise InvalidRequest("The prompt must not be empty.", field)
        check_length(len(text) // self._longest_token_bytes, self.model, field)
        if len(text) < THREAD_FROM_CHARACTERS:
            return self._tokenizer.encode(text)
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._tokenizer.encode, text)

    async def chat_ids(self, messages: Sequence[tuple[str, str]], field: str) -> list[int]:
        """Token ids of a conversation, given as (role, content). Raises InvalidRequest."""
        check_chat(messages, field)
        characters = sum(len(content) for _, content in messages)
        check_length(characters // self._longest_token_bytes, self.model, field)
        turns = [{"role": TEMPLATE_ROLES.get(role, role), "content": text} for role, text in messages]
        if characters < THREAD_FROM_CHARACTERS:
            return self._render_and_encode(turns)
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._render_and_encode, turns)

    async def from_wire(self, message: pb.GenerateRequest, remaining_s: float | None) -> GenerationRequest:
        """A checked, tokenised request; `remaining_s` is left of the gRPC deadline. Raises InvalidRequest."""
        arrived_s = self._clock()
        request_id = message.request_id or f"req-{uuid.uuid4().hex}"
        check_request_id(request_id)
        check_model(message.model, self.model)
        check_priority(message.priority)
        timeout_s = timeout_from(message.timeout_s, self.model)
        params = sampling_from_wire(message.sampling)
        check_sampling(params, self.model.vocabulary_tokens, lambda name: f"sampling.{name}")
        slo_class = slo_class_name(message.slo_class, self.model)
        token_ids, field = await self._prompt_of(message)
        params = self._completed(params, message.sampling.HasField("seed"), request_id, len(token_ids), field)
        return GenerationRequest(
            request_id=RequestId(request_id),
            token_ids=tuple(token_ids),
            sampling=params,
            slo_class=slo_class,
            arrived_s=arrived_s,
            priority=message.priority,
            timeout_s=timeout_s if remaining_s is None else min(timeout_s, remaining_s),
            resume=resume_points(message.resume, params, self.model),
        )

    def from_parts(
        self,
        request_id: str,
        token_ids: Sequence[int],
        params: SamplingParams,
        seeded: bool,
        arrived_s: float,
        field: str,
    ) -> GenerationRequest:
        """A request of the HTTP door, whose fields were checked. Raises PromptTooLong, naming `field`."""
        return GenerationRequest(
            request_id=RequestId(request_id),
            token_ids=tuple(token_ids),
            sampling=self._completed(params, seeded, request_id, len(token_ids), field),
            slo_class=self.model.default_slo_class,
            arrived_s=arrived_s,
        )

    async def _prompt_of(self, message: pb.GenerateRequest) -> tuple[Sequence[int], str]:
        """(token ids, field they came from)."""
        kind = message.WhichOneof("prompt")
        if kind == "text":
            return await self.text_ids(message.text, "text"), "text"
        if kind == "chat":
            turns = [(turn.role, turn.content) for turn in message.chat.messages]
            return await self.chat_ids(turns, "chat.messages"), "chat"
        if kind == "token_ids":
            check_prompt_ids(message.token_ids.ids, self.model, "token_ids.ids")
            return message.token_ids.ids, "token_ids"
        raise InvalidRequest("One of text, chat or token_ids is required.", "prompt")

    def _completed(
        self, params: SamplingParams, seeded: bool, request_id: str, prompt_tokens: int, field: str
    ) -> SamplingParams:
        """With max_tokens and seed filled in."""
        params = fit_context(prompt_tokens, params, self.model.context_tokens, field)
        return params if seeded else replace(params, seed=derived_seed(request_id))

    def _render_and_encode(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        return self._tokenizer.encode_rendered(self._tokenizer.render_chat(turns))
