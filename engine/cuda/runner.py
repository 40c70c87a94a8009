"""Edge: carries out step plans on a GPU: a graph for plain decode steps, fused kernels for the rest."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from engine.contract import LayerListener
from engine.cuda.attention import PagedAttention
from engine.cuda.batch import DeviceBatch, HostBatch, host_batch
from engine.cuda.decoder import CudaDecoder
from engine.cuda.graphs import DecodeGraphs
from engine.cuda.kernels.draw import draw_tokens
from engine.drafting.draft import Proposal
from engine.drafting.runner_drafter import RunnerDrafter, grown_sequences
from engine.kv_cache import KvCache
from engine.logit_rules import changes_logits
from engine.random_numbers import uniform
from engine.sampler import NOTHING, Sampler
from engine.step import SampledToken, SampleRequest, SequenceSlice, StepPlan, StepResult


class CudaStepRunner:
    """StepRunner on one device; `run` may be called from any one thread.

    The host waits for the device once a step, when it reads the tokens; a step without any is waited for,
    too, since its blocks may be offered when `run` returns.
    """

    def __init__(
        self,
        decoder: CudaDecoder,
        cache: KvCache,
        layers: int,
        attention: PagedAttention,
        branching: PagedAttention,
        sampler: Sampler,
        graphs: DecodeGraphs | None,
        drafter: RunnerDrafter | None = None,
    ) -> None:
        """`branching` attends for trees of guesses; `graphs` None runs every step without one."""
        self._decoder = decoder
        self._cache = cache
        self._layers = layers
        self._attention = attention
        self._branching = branching
        self._sampler = sampler
        self._graphs = graphs
        self._drafter = drafter

    def run(self, plan: StepPlan, on_layers: LayerListener | None = None) -> StepResult:
        """Copies blocks, feeds the slices, draws the tokens; `on_layers` as StepRunner says.

        Raises ProtocolError for a slice without tokens, IndexError for a block table that is too short.
        """
        began = time.perf_counter()
        device = self._cache.pool.device
        with torch.inference_mode(), current_device(device):
            self._cache.copy_blocks(plan.copies)
            tokens, proposals = self._tokens(plan.slices, on_layers) if plan.slices else ([], [])
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return StepResult(plan.step, tuple(tokens), time.perf_counter() - began, tuple(proposals))

    def _tokens(
        self, slices: Sequence[SequenceSlice], on_layers: LayerListener | None
    ) -> tuple[list[SampledToken], list[Proposal]]:
        host = host_batch(slices, self._layers, self._cache.block_size)
        features = self._features(host, on_layers)
        requests = [request for part in slices for request in part.samples]
        if not requests:
            return [], []
        logits = self._decoder.logits(features)
        if len(requests) > features.shape[0]:
            picks = torch.from_numpy(host.picks).to(logits.device)
            logits, features = logits[picks], features[picks]
        if self._sampler.plain and all(map(_plain, requests)):
            tokens = _draw(logits, requests)
        else:
            tokens = self._sampler.sample(logits.float(), requests)
        if self._drafter is None:
            return tokens, []
        return tokens, self._drafter.propose(grown_sequences(slices, tokens, features))

    def _features(self, host: HostBatch, on_layers: LayerListener | None) -> Tensor:
        """[logit_rows, hidden]; a graph tells of no layers, so it is not used where somebody listens."""
        if self._graphs is not None and on_layers is None:
            captured = self._graphs.features(host)
            if captured is not None:
                return captured
        device = self._cache.pool.device
        batch = DeviceBatch.of(host, device)
        attention = self._branching if host.branches else self._attention
        attention.plan(batch)
        if on_layers is None or device.type != "cuda":
            return self._decoder.features(batch, attention, on_layers)
        marks = _LayerMarks()
        features = self._decoder.features(batch, attention, marks.mark)
        marks.tell(on_layers)
        return features


class _LayerMarks:
    """Events on the device behind each layer's K and V.

    The host queues all layers long before the device has computed the first, so it can tell of each in turn
    while it would wait anyway.
    """

    def __init__(self) -> None:
        self._events: list[tuple[int, Any]] = []

    def mark(self, layers: int) -> None:
        """Remembers the place in the stream."""
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((layers, event))

    def tell(self, on_layers: LayerListener) -> None:
        """Waits for each layer's place and says so."""
        for layers, event in self._events:
            event.synchronize()
            on_layers(layers)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that kernels are launched on: CUDA and Triton keep that per thread."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
        SampledToken(request.key, request.sample_index, token_id, None, request.row)
        for request, token_id in zip(requests, drawn.tolist(), strict=True)
        if token_id != NOTHING
    ]
