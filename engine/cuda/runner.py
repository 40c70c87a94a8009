"""Edge: carries out step plans on a GPU: a graph for plain decode steps, fused kernels for the rest."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.contract import LayerListener
from engine.cuda.attention import PagedAttention
from engine.cuda.batch import DeviceBatch, HostBatch, host_batch, sent
from engine.cuda.decoder import CudaDecoder
from engine.cuda.drawn import DrawnTokens
from engine.cuda.graphs import DecodeGraphs
from engine.drafting.draft import Proposal
from engine.drafting.runner_drafter import RunnerDrafter, grown_sequences
from engine.kv.kv_cache import KvCache
from engine.sampling.logit_rules import changes_logits
from engine.sampling.sampler import Sampler
from engine.step import SampleRequest, SequenceSlice, StepPlan, StepResult
from tandem.errors import ProtocolError


class CudaStepInFlight:
    """A step that the device computes or has computed."""

    def __init__(
        self,
        step: int,
        drawn: DrawnTokens | None,
        proposals: Sequence[Proposal],
        done: "_Mark",
        took_s: Callable[[], float],
    ) -> None:
        """`done` stands behind all that the step writes; `took_s` is asked when it is over."""
        self._step = step
        self._drawn = drawn
        self._proposals = tuple(proposals)
        self._done = done
        self._took_s = took_s

    def result(self) -> StepResult:
        """See StepInFlight."""
        tokens = () if self._drawn is None else tuple(self._drawn.tokens())
        self._done.wait()
        return StepResult(self._step, tokens, self._took_s(), self._proposals)


class CudaStepRunner:
    """PipelinedRunner on one device; to be called from any one thread.

    The host waits for the device once a step, when it reads the tokens; a step without any is waited for,
    too, since its blocks may be offered when its result is there.
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
        self._last_drawn: DrawnTokens | None = None
        self._over_s = 0.0
        # Planning fills buffers on the host from which the step before may still be copied to the device.
        self._planned = _Mark(cache.pool.device)

    def run(self, plan: StepPlan, on_layers: LayerListener | None = None) -> StepResult:
        """Copies blocks, feeds the slices, draws the tokens; `on_layers` as StepRunner says.

        Raises ProtocolError for a slice without tokens, IndexError for a block table that is too short.
        """
        return self.begin(plan, on_layers).result()

    def begin(self, plan: StepPlan, on_layers: LayerListener | None = None) -> CudaStepInFlight:
        """Queues a step on the device, see PipelinedRunner; raises as `run`."""
        began_s, device = time.perf_counter(), self._cache.pool.device
        drawn: DrawnTokens | None = None
        proposals: Sequence[Proposal] = ()
        with torch.inference_mode(), current_device(device):
            self._planned.wait()
            self._cache.copy_blocks(plan.copies)
            if plan.slices:
                drawn, proposals = self._draw(plan.slices, on_layers)
            done = _Mark(device)
        self._last_drawn = drawn
        return CudaStepInFlight(plan.step, drawn, proposals, done, partial(self._took_s, began_s))

    def _took_s(self, began_s: float) -> float:
        """Seconds since a step was begun, or since the one before it was over."""
        began_s, self._over_s = max(began_s, self._over_s), time.perf_counter()
        return self._over_s - began_s

    def _draw(
        self, slices: Sequence[SequenceSlice], on_layers: LayerListener | None
    ) -> tuple[DrawnTokens | None, Sequence[Proposal]]:
        host = host_batch(slices, self._layers, self._cache.block_size)
        features = self._features(host, self._filling(slices), on_layers)
        requests = [request for part in slices for request in part.samples]
        if not requests:
            return None, ()
        logits = self._decoder.logits(features)
        if len(requests) > features.shape[0]:
            picks = sent(host.picks, logits.device)
            logits, features = logits[picks], features[picks]
        if self._sampler.plain and all(map(_plain, requests)):
            drawn = DrawnTokens.by_temperature(logits, requests)
        else:
            drawn = DrawnTokens.known(self._sampler.sample(logits.float(), requests), requests, logits.device)
        if self._drafter is None:
            return drawn, ()
        return drawn, self._drafter.propose(grown_sequences(slices, drawn.tokens(), features))

    def _filling(self, slices: Sequence[SequenceSlice]) -> Callable[[Tensor], None]:
        """What writes the tokens of slices that follow the last step."""
        if not any(part.follows for part in slices):
            return lambda _token_ids: None
        if self._last_drawn is None:
            raise ProtocolError("A slice follows a step that draws no token.")
        return self._last_drawn.filling(slices)

    def _features(
        self, host: HostBatch, fill: Callable[[Tensor], None], on_layers: LayerListener | None
    ) -> Tensor:
        """[logit_rows, hidden]; a graph tells of no layers, so it is not used where somebody listens."""
        device = self._cache.pool.device
        if self._graphs is not None and on_layers is None:
            replay = self._graphs.prepare(host, fill)
            if replay is not None:
                self._planned = _Mark(device)
                return replay()
        batch = DeviceBatch.of(host, device)
        fill(batch.token_ids)
        attention = self._branching if host.branches else self._attention
        attention.plan(batch)
        self._planned = _Mark(device)
        if on_layers is None or device.type != "cuda":
            return self._decoder.features(batch, attention, on_layers)
        marks = _LayerMarks()
        features = self._decoder.features(batch, attention, marks.mark)
        marks.tell(on_layers)
        return features


class _Mark:
    """A place in the stream of a GPU, now; nothing where work is done at once."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until the device has come there."""
        if self._event is not None:
            self._event.synchronize()


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
