"""Edge: carries out step plans on a GPU: a graph for plain decode steps, fused kernels for the rest."""

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.cuda.attention import PagedAttention
from engine.cuda.batch import DeviceBatch, HostBatch, host_batch
from engine.cuda.decoder import CudaDecoder
from engine.cuda.graphs import DecodeGraphs
from engine.cuda.kernels.draw import draw_tokens
from engine.kv_cache import KvCache
from engine.logit_rules import changes_logits
from engine.random_numbers import uniform
from engine.sampler import NOTHING
from engine.step import SampledToken, SampleRequest, StepPlan, StepResult


class TokenSampler(Protocol):
    """What the runner asks of engine.sampler for rows with filters, penalties or log-probabilities."""

    def sample(self, logits: Tensor, requests: Sequence[SampleRequest]) -> list[SampledToken]:
        """Draws one token for each request i from row i of the float32 logits [rows, vocabulary]."""
        ...


class CudaStepRunner:
    """StepRunner on one device; `run` may be called from any one thread.

    The host waits for the device once a step: when it reads the tokens.
    """

    def __init__(
        self,
        decoder: CudaDecoder,
        cache: KvCache,
        layers: int,
        attention: PagedAttention,
        sampler: TokenSampler,
        graphs: DecodeGraphs | None,
    ) -> None:
        """`graphs` None runs every step without one."""
        self._decoder = decoder
        self._cache = cache
        self._layers = layers
        self._attention = attention
        self._sampler = sampler
        self._graphs = graphs

    def run(self, plan: StepPlan) -> StepResult:
        """Copies blocks, feeds the slices, draws the tokens.

        Raises ProtocolError for a slice without tokens, IndexError for a block table that is too short.
        """
        began = time.perf_counter()
        with torch.inference_mode():
            self._cache.copy_blocks(plan.copies)
            tokens = self._tokens(plan) if plan.slices else []
        return StepResult(plan.step, tuple(tokens), time.perf_counter() - began)

    def _tokens(self, plan: StepPlan) -> list[SampledToken]:
        host = host_batch(plan.slices, self._layers, self._cache.block_size)
        logits = self._logits(host)
        requests = [request for part in plan.slices for request in part.samples]
        if not requests:
            return []
        drawing = [part for part in plan.slices if part.samples]
        if len(requests) > len(drawing):
            rows = [row for row, part in enumerate(drawing) for _ in part.samples]
            logits = logits[torch.tensor(rows, device=logits.device)]
        if all(map(_plain, requests)):
            return _draw(logits, requests)
        return self._sampler.sample(logits.float(), requests)

    def _logits(self, host: HostBatch) -> Tensor:
        captured = None if self._graphs is None else self._graphs.forward(host)
        if captured is not None:
            return captured
        batch = DeviceBatch.of(host, self._cache.pool.device)
        self._attention.plan(batch)
        return self._decoder.forward(batch, self._attention)


def _plain(request: SampleRequest) -> bool:
    """Whether temperature alone decides how the token is drawn."""
    params = request.params
    filters = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    return not filters and params.logprobs is None and not changes_logits(request)


def _draw(logits: Tensor, requests: Sequence[SampleRequest]) -> list[SampledToken]:
    device = logits.device
    temperatures = torch.tensor([request.params.temperature for request in requests], dtype=torch.float32)
    uniforms = torch.tensor(
        [uniform(part.params.seed, part.sample_index, part.output_index) for part in requests],
        dtype=torch.float64,
    )
    drawn = torch.empty(len(requests), dtype=torch.int64, device=device)
    draw_tokens(logits.contiguous(), temperatures.to(device), uniforms.to(device), drawn)
    return [
        SampledToken(request.key, request.sample_index, token_id, None)
        for request, token_id in zip(requests, drawn.tolist(), strict=True)
        if token_id != NOTHING
    ]
