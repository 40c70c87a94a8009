"""Edge: tandem.v1.InferenceService: Generate streams a request's updates, ListModels names the model."""

from collections.abc import Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError, Message

from engine.models.tokenizer import Tokenizer
from router.intake import Intake
from router.request import Chunk, GenerationUpdate, TimelineReport, TokenUsage
from router.service_core import RouterCore
from tandem.errors import InvalidRequest
from tandem.sampling import TokenLogprob
from tandem.v1 import inference_pb2 as pb
from tandem.wire import FINISH_TO_WIRE

SERVICE_NAME = "tandem.v1.InferenceService"

MessageT = TypeVar("MessageT", bound=Message)


def parsed_or_none(kind: type[MessageT]) -> Callable[[bytes], MessageT | None]:
    """A deserialiser that gives None for bytes that are no such message (as with text that is not UTF-8)."""

    def parse(data: bytes) -> MessageT | None:
        try:
            return kind.FromString(data)
        except DecodeError:
            return None

    return parse


class InferenceService:
    """The public gRPC service."""

    def __init__(self, core: RouterCore, intake: Intake, tokenizer: Tokenizer) -> None:
        self._core = core
        self._intake = intake
        self._token_bytes = tokenizer.token_bytes

    def handlers(self) -> grpc.GenericRpcHandler:
        """The service's methods, with deserialisers that let us name what is wrong with a message."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.generate, parsed_or_none(pb.GenerateRequest), pb.GenerateResponse.SerializeToString
            ),
            "ListModels": grpc.unary_unary_rpc_method_handler(
                self.list_models,
                parsed_or_none(pb.ListModelsRequest),
                pb.ListModelsResponse.SerializeToString,
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def generate(
        self,
        message: pb.GenerateRequest | None,
        context: "grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]",
    ) -> None:
        """Streams until the last token; a call that ends early, by whatever cause, cancels the request."""
        if message is None:
            raise InvalidRequest("The message is no GenerateRequest, or a text in it is not valid UTF-8.")
        request = await self._intake.from_wire(message, context.time_remaining())
        # Each call is a task with a context of its own, so this is in the lines of this call alone.
        structlog.contextvars.bind_contextvars(request_id=request.request_id)
        async with aclosing(self._core.generate(request)) as updates:
            async for update in updates:
                await context.write(self._response(request.request_id, update))

    async def list_models(
        self,
        _message: pb.ListModelsRequest | None,
        _context: "grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse]",
    ) -> pb.ListModelsResponse:
        """The one model."""
        model = self._intake.model
        return pb.ListModelsResponse(
            models=[
                pb.Model(
                    name=model.name,
                    context_tokens=model.context_tokens,
                    vocabulary_tokens=model.vocabulary_tokens,
                )
            ]
        )

    def _response(self, request_id: str, update: GenerationUpdate) -> pb.GenerateResponse:
        chunks = [self._chunk(chunk) for chunk in update.chunks]
        if update.usage is None or update.timeline is None:
            return pb.GenerateResponse(request_id=request_id, chunks=chunks)
        return pb.GenerateResponse(
            request_id=request_id,
            chunks=chunks,
            usage=_usage(update.usage),
            timeline=_timeline(update.timeline),
        )

    def _chunk(self, chunk: Chunk) -> pb.TokenChunk:
        message = pb.TokenChunk(
            sample_index=chunk.sample_index,
            first_index=chunk.first_index,
            token_ids=chunk.token_ids,
            text=chunk.text,
        )
        if chunk.logprobs:
            message.logprobs.extend([self._logprob(entry) for entry in chunk.logprobs])
        if chunk.finish is not None:
            message.finish_reason = FINISH_TO_WIRE[chunk.finish]
            if chunk.stop_string is not None:
                message.stop_string = chunk.stop_string
            elif chunk.stop_token_id is not None:
                message.stop_token_id = chunk.stop_token_id
        return message

    def _logprob(self, entry: TokenLogprob) -> pb.TokenLogprob:
        top = [
            pb.TopLogprob(token_id=token_id, logprob=logprob, token=self._token_bytes(token_id))
            for token_id, logprob in entry.top
        ]
        return pb.TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=top,
            token=self._token_bytes(entry.token_id),
        )


def _usage(usage: TokenUsage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _timeline(report: TimelineReport) -> pb.Timeline:
    return pb.Timeline(
        queue_s=report.queue_s,
        prefill_s=report.prefill_s,
        handoff_s=report.handoff_s,
        decode_s=report.decode_s,
        ttft_s=report.ttft_s,
        tpot_s=report.tpot_s,
        longest_gap_s=report.longest_gap_s,
        prefill_worker=report.prefill_worker,
        decode_worker=report.decode_worker,
        transport=report.transport,
        handoff_bytes=report.handoff_bytes,
        replacements=report.replacements,
        slo_met=report.slo_met,
        slo_missed_by=report.slo_missed_by,
    )
