"""Edge: carries out frozen step plans with torch."""

import threading
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.attention import AttentionBackend, Span
from engine.contract import LayerListener
from engine.decoder import Decoder
from engine.drafting.draft import NO_DRAFT, Proposal
from engine.drafting.runner_drafter import RunnerDrafter, grown_sequences
from engine.kv.kv_cache import KvCache
from engine.step import SampledToken, SampleRequest, SequenceSlice, StepPlan, StepResult
from tandem.errors import ProtocolError


class TokenSampler(Protocol):
    """What the runner asks of engine.sampling.sampler."""

    def sample(self, logits: Tensor, requests: Sequence[SampleRequest]) -> list[SampledToken]:
        """Draws one token for each request i from row i of the float32 logits [rows, vocabulary]."""
        ...


class TorchStepRunner:
    """StepRunner over one decoder, cache and sampler; `run` may be called from any one thread."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KvCache,
        attention: AttentionBackend,
        sampler: TokenSampler,
        device: torch.device,
        threads: int,
        drafter: RunnerDrafter | None = None,
    ) -> None:
        """`threads` is the number of cores that a step may use on the CPU; `drafter` guesses for who asks."""
        self._decoder = decoder
        self._cache = cache
        self._attention = attention
        self._sampler = sampler
        self._device = device
        self._threads = threads
        self._drafter = drafter
        self._prepared = threading.local()

    def run(self, plan: StepPlan, on_layers: LayerListener | None = None) -> StepResult:
        """Copies blocks, feeds the slices, draws the tokens; `on_layers` as StepRunner says.

        Raises ProtocolError for a slice without tokens, IndexError for a block table that is too short or a
        token outside the vocabulary.
        """
        self._prepare_thread()
        began = time.perf_counter()
        with torch.inference_mode():
            self._cache.copy_blocks(plan.copies)
            # Elsewhere the decoder only queues kernels: a layer of which it tells may not be written yet.
            heard = on_layers if self._device.type == "cpu" else None
            tokens, proposals = self._tokens(plan.slices, heard) if plan.slices else ([], [])
        return StepResult(plan.step, tuple(tokens), time.perf_counter() - began, tuple(proposals))

    def _tokens(
        self, slices: tuple[SequenceSlice, ...], on_layers: LayerListener | None
    ) -> tuple[list[SampledToken], list[Proposal]]:
        batch = _FlatBatch(slices)
        places = {row: place for place, row in enumerate(dict.fromkeys(batch.rows))}
        features = self._decoder.features(
            self._indices(batch.token_ids),
            self._indices(batch.positions),
            self._attention.prepare(batch.spans),
            self._indices(list(places)),
            on_layers,
        )
        if not batch.requests:
            return [], []
        logits = self._decoder.logits(features)
        if len(places) < len(batch.rows):
            copies = self._indices([places[row] for row in batch.rows])
            logits, features = logits[copies], features[copies]
        tokens = self._sampler.sample(logits, batch.requests)
        return tokens, self._propose(slices, tokens, features)

    def _propose(
        self, slices: Sequence[SequenceSlice], tokens: Sequence[SampledToken], features: Tensor
    ) -> list[Proposal]:
        """Guesses for the sequences whose slices ask for them; `features` [requests, hidden]."""
        if self._drafter is None:
            return []
        return self._drafter.propose(grown_sequences(slices, tokens, features))

    def _indices(self, values: list[int]) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64)).to(self._device)

    def _prepare_thread(self) -> None:
        """torch keeps its thread count per calling thread, and a new thread starts with the machine's."""
        if not getattr(self._prepared, "done", False):
            torch.set_num_threads(self._threads)
            self._prepared.done = True


class _FlatBatch:
    """Slices one after the other, in one pass: rows of the batch, and which of them tokens are drawn from."""

    __slots__ = ("positions", "requests", "rows", "spans", "token_ids")

    def __init__(self, slices: Sequence[SequenceSlice]) -> None:
        """Raises ProtocolError for a slice without tokens."""
        self.spans: list[Span] = []
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.requests: list[SampleRequest] = []
        self.rows: list[int] = []
        for part in slices:
            first, count = len(self.token_ids), len(part.token_ids)
            if count == 0:
                raise ProtocolError("A step plan holds a slice without tokens.")
            tree = part.draft if part.draft.parents else NO_DRAFT
            span = Span(first, count, part.start, part.block_table, tree, part.bounded)
            self.spans.append(span)
            self.token_ids += part.token_ids
            self.positions += span.positions()
            for request in part.samples:
                self.requests.append(request)
                self.rows.append(first + request.row % count)
