"""Edge: OpenAI's API over HTTP, with health, readiness and metrics."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import orjson
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from engine.models.tokenizer import Tokenizer
from router.http_edge import EdgeMiddleware, UntilDisconnected, request_id_of
from router.intake import Intake
from router.merged import merged
from router.openai_answer import (
    AnswerFormat,
    Choice,
    UsageSum,
    error_headers_of,
    error_json,
    error_json_of,
)
from router.openai_schema import ChatBody, CompletionBody, SharedBody, read_body
from router.request import GenerationRequest
from router.service_core import RouterCore
from router.validation import check_model, check_priority, check_prompt_ids, slo_class_name
from tandem.errors import InvalidRequest, TandemError
from tandem.sampling import SamplingParams

log = structlog.get_logger(__name__)

BODY_TIMEOUT_S = 30.0
INTERNAL_TEXT = "Internal error; the router's log says more."


def json_response(status: int, content: object, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


class OpenAiDoor:
    """The HTTP front door, an ASGI application."""

    def __init__(self, core: RouterCore, intake: Intake, tokenizer: Tokenizer, api_key: str | None) -> None:
        self._core = core
        self._intake = intake
        self._tokenizer = tokenizer
        self._started = int(time.time())
        routes = [
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._one_model, methods=["GET"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat_completions, methods=["POST"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/ready", self._ready, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        handlers = {TandemError: _tandem_error, HTTPException: _http_error, Exception: _unexpected_error}
        application = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
        self._application = EdgeMiddleware(application, api_key, core.metrics.calls)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        await self._application(scope, receive, send)

    async def _models(self, _request: Request) -> Response:
        return json_response(200, {"object": "list", "data": [self._model_json()]})

    async def _one_model(self, request: Request) -> Response:
        check_model(request.path_params["name"], self._intake.model)
        return json_response(200, self._model_json())

    def _model_json(self) -> dict[str, object]:
        model = self._intake.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "tandem",
            "max_model_len": model.context_tokens,
        }

    async def _completions(self, request: Request) -> Response:
        arrived_s = self._core.clock()
        body = read_body(CompletionBody, await self._read(request))
        check_model(body.model or "", self._intake.model)
        params = body.params(self._intake.model.vocabulary_tokens)
        given, prompts = body.prompts(), []
        for prompt in given:
            if isinstance(prompt, str):
                prompts.append(await self._intake.text_ids(prompt, "prompt"))
            else:
                check_prompt_ids(prompt, self._intake.model, "prompt")
                prompts.append(prompt)
        echoes = [self._text_of(prompt) if body.echo else "" for prompt in given]
        choices = [Choice(index, echoes[index // params.n]) for index in range(len(prompts) * params.n)]
        return self._answer(request, body, params, prompts, choices, arrived_s)

    async def _chat_completions(self, request: Request) -> Response:
        arrived_s = self._core.clock()
        body = read_body(ChatBody, await self._read(request))
        check_model(body.model or "", self._intake.model)
        params = body.params(self._intake.model.vocabulary_tokens)
        prompt = await self._intake.chat_ids(body.turns(), "messages")
        choices = [Choice(index) for index in range(params.n)]
        return self._answer(request, body, params, [prompt], choices, arrived_s)

    def _text_of(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _answer(
        self,
        request: Request,
        body: SharedBody,
        params: SamplingParams,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Choice],
        arrived_s: float,
    ) -> Response:
        answer_id = _answer_id(request, body.answer_prefix)
        # As in vLLM, a lower number goes first at this door; inside, and over gRPC, a higher one does.
        priority = body.priority or 0
        check_priority(priority)
        slo_class = slo_class_name(body.slo_class or "", self._intake.model)
        requests = []
        for at, prompt in enumerate(prompts):
            request_id = answer_id if len(prompts) == 1 else f"{answer_id}-{at}"
            seeded = body.seed is not None
            made = self._intake.from_parts(request_id, prompt, params, seeded, arrived_s, body.prompt_field)
            requests.append(replace(made, slo_class=slo_class, priority=-priority))
        form = AnswerFormat(
            isinstance(body, ChatBody),
            answer_id,
            self._intake.model.name,
            int(time.time()),
            params.logprobs,
            self._tokenizer.token_bytes,
        )
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        if body.stream:
            events = self._events(requests, form, choices, with_usage)
            return UntilDisconnected(events, "text/event-stream")
        return UntilDisconnected(self._whole(requests, form, choices), "application/json")

    async def _whole(
        self, requests: Sequence[GenerationRequest], form: AnswerFormat, choices: Sequence[Choice]
    ) -> AsyncIterator[bytes]:
        """The whole answer in one piece, when everything has come."""
        usage = UsageSum()
        async with merged(self._core, requests) as updates:
            async for at, update in updates:
                for chunk in update.chunks:
                    form.add(choices[at * requests[at].sampling.n + chunk.sample_index], chunk)
                if update.usage is not None:
                    usage.add(update.usage)
        yield orjson.dumps(form.whole(choices, usage))

    async def _events(
        self,
        requests: Sequence[GenerationRequest],
        form: AnswerFormat,
        choices: Sequence[Choice],
        with_usage: bool,
    ) -> AsyncIterator[bytes]:
        """Server-sent events; an error after the first becomes an event, since the status is out by then."""
        usage = UsageSum()
        begun = False
        try:
            async with merged(self._core, requests) as updates:
                async for at, update in updates:
                    if update.usage is not None:
                        usage.add(update.usage)
                    events: list[bytes] = []
                    for chunk in update.chunks:
                        choice = choices[at * requests[at].sampling.n + chunk.sample_index]
                        events += map(_event, form.stream_chunks(choice, chunk, with_usage))
                    if events:
                        begun = True
                        yield b"".join(events)
        except TandemError as error:
            if not begun:
                raise
            yield _event(error_json_of(error)) + b"data: [DONE]\n\n"
            return
        yield (_event(form.usage_chunk(usage)) if with_usage else b"") + b"data: [DONE]\n\n"

    async def _health(self, _request: Request) -> Response:
        return json_response(200, {"status": "alive"})

    async def _ready(self, _request: Request) -> Response:
        verdict = self._core.verdict()
        return json_response(
            200 if verdict.ready else 503, {"ready": verdict.ready, "reason": verdict.reason}
        )

    async def _metrics(self, _request: Request) -> Response:
        return Response(self._core.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _read(self, request: Request) -> bytes:
        """The body, bounded in size and time."""
        most = self._core.config.max_body_bytes
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise HTTPException(413, f"The body must have at most {most} bytes.")
                    parts.append(part)
        except TimeoutError:
            raise HTTPException(408, "The body did not arrive in time.") from None
        except ClientDisconnect:
            raise InvalidRequest("The client left before its request had arrived.") from None
        return b"".join(parts)


def _answer_id(request: Request, prefix: str) -> str:
    """Unique also where several calls carry the same X-Request-Id, as the parts of one job do."""
    return f"{prefix}-{request_id_of(request.scope)}-{uuid.uuid4().hex[:8]}"


def _event(content: object) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def _tandem_error(_request: Request, error: TandemError) -> Response:
    return json_response(error.http_status, error_json_of(error), error_headers_of(error))


async def _http_error(request: Request, error: HTTPException) -> Response:
    texts = {
        404: f"There is nothing at {request.url.path[:200]}.",
        405: f"{request.method[:16]} is not allowed at {request.url.path[:200]}.",
    }
    message = texts.get(error.status_code, error.detail)
    return json_response(error.status_code, error_json(error.status_code, message), dict(error.headers or {}))


async def _unexpected_error(request: Request, error: Exception) -> Response:
    # The server logs the traceback, but does not know the id.
    log.error("unexpected error in a call", request_id=request_id_of(request.scope), error=repr(error))
    return json_response(500, error_json(500, INTERNAL_TEXT))
