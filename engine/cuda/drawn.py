"""Edge: the tokens that a step draws: on the device for the step that follows, on the host a little later."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.cuda.batch import sent
from engine.cuda.kernels.draw import draw_tokens
from engine.sampling.random_numbers import uniform
from engine.sampling.sampler import NOTHING
from engine.step import SampledToken, SampleRequest, SequenceSlice
from tandem.errors import ProtocolError


class DrawnTokens:
    """What one step draws for its requests, in their order; int64 `on_device` [requests].

    The copy to the host is under way from the start, and nobody waits for it before `tokens`.
    """

    def __init__(
        self,
        requests: Sequence[SampleRequest],
        on_device: Tensor,
        known: Sequence[SampledToken] | None = None,
    ) -> None:
        """`known` are the tokens where the host has them already."""
        self._requests = requests
        self._known = known
        self._on_device = on_device
        self._rows = {request.key: row for row, request in enumerate(requests)}
        self._copied: Any = None
        self._on_host = on_device
        if known is None and on_device.device.type == "cuda":
            self._on_host = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self._on_host.copy_(on_device, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    @classmethod
    def by_temperature(cls, logits: Tensor, requests: Sequence[SampleRequest]) -> "DrawnTokens":
        """Draws where temperature alone decides; logits [requests, vocabulary]."""
        temperatures = np.array([request.params.temperature for request in requests], dtype=np.float32)
        uniforms = np.array(
            [uniform(part.params.seed, part.sample_index, part.output_index) for part in requests],
            dtype=np.float64,
        )
        drawn = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
        draw_tokens(
            logits.contiguous(), sent(temperatures, logits.device), sent(uniforms, logits.device), drawn
        )
        return cls(requests, drawn)

    @classmethod
    def known(
        cls, tokens: Sequence[SampledToken], requests: Sequence[SampleRequest], device: torch.device
    ) -> "DrawnTokens":
        """Of tokens that the host knows already; who drew none has NOTHING."""
        by_request = {(token.key, token.row): token.token_id for token in tokens}
        numbers = [by_request.get((request.key, request.row), NOTHING) for request in requests]
        return cls(requests, sent(np.array(numbers, dtype=np.int64), device), tokens)

    def tokens(self) -> Sequence[SampledToken]:
        """Waits for the copy; requests that drew nothing have no token."""
        if self._known is not None:
            return self._known
        if self._copied is not None:
            self._copied.synchronize()
        return [
            SampledToken(request.key, request.sample_index, token_id, None, request.row)
            for request, token_id in zip(self._requests, self._on_host.tolist(), strict=True)
            if token_id != NOTHING
        ]

    def filling(self, slices: Sequence[SequenceSlice]) -> Callable[[Tensor], None]:
        """Writes into a batch's token ids what those of `slices` that follow this step feed.

        A slice whose sample drew nothing feeds token 0: the scheduler drops it. Raises ProtocolError for a
        slice that follows a step in which its sample drew none.
        """
        rows, sources, row = [], [], 0
        for part in slices:
            if part.follows:
                source = self._rows.get(part.samples[0].key)
                if source is None:
                    raise ProtocolError("A slice follows a step that draws no token for it.")
                rows.append(row)
                sources.append(source)
            row += len(part.token_ids)
        device = self._on_device.device
        targets = sent(np.array(rows, dtype=np.int64), device)
        taken = self._on_device[sent(np.array(sources, dtype=np.int64), device)].clamp(min=0)

        def fill(token_ids: Tensor) -> None:
            token_ids.index_copy_(0, targets, taken)

        return fill
