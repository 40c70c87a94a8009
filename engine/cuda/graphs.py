"""Edge: decode steps captured once by batch size and replayed, so that the host launches one graph a step.

A batch runs in the smallest bucket that holds it; the rows left over feed token 0 into a block of the pool
that belongs to nobody.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import structlog
import torch
from torch import Tensor

from engine.cuda.attention import PagedAttention
from engine.cuda.batch import DeviceBatch, HostBatch
from engine.cuda.decoder import CudaDecoder
from engine.cuda.memory_plan import bucket_for

_WARM_UPS = 2

_log = structlog.get_logger("tandem.engine")


class Capture(Protocol):
    """Turns work on the device into something that can be replayed on the same tensors."""

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, result): each replay renews the result in place."""
        ...


class CudaCapture:
    """CUDA graphs that share one pool of memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See Capture. Kernels are compiled and libraries started on a side stream first."""
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = work()
        return graph.replay, result


class DecodeGraphs:
    """The captured decode steps of one decoder; used from one thread."""

    def __init__(
        self,
        decoder: CudaDecoder,
        attention: PagedAttention,
        capture: Capture,
        buckets: Sequence[int],
        table_width: int,
        padding_block: int,
        padding_slot: int,
        device: torch.device,
    ) -> None:
        """`table_width` is the most blocks of a sequence; the padding block and its first slot are spare."""
        self._decoder = decoder
        self._attention = attention
        self._capture = capture
        self._buckets = tuple(sorted(buckets))
        self._padding_block = padding_block
        self._padding_slot = padding_slot
        nothing = np.empty(0, dtype=np.int64)
        self._empty = HostBatch(
            nothing,
            nothing,
            nothing,
            np.empty((0, table_width), np.int32),
            nothing.astype(np.int32),
            nothing,
            nothing,
            (),
            (),
        )
        self._static = DeviceBatch.of(
            self._empty.padded(self._buckets[-1], padding_block, padding_slot), device
        )
        self._captured: dict[int, tuple[Callable[[], None], Tensor]] = {}

    def capture_all(self, within_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Captures every bucket, largest first so that they share its memory; stops when the time is up.

        Buckets that were not captured run without a graph.
        """
        began_s = clock()
        for bucket in reversed(self._buckets):
            if clock() - began_s > within_s:
                _log.warning("some decode graphs were not captured in time", captured=len(self._captured))
                return
            batch = self._rows(bucket, self._empty.padded(bucket, self._padding_block, self._padding_slot))
            self._attention.plan(batch)
            self._captured[bucket] = self._capture(partial(self._decoder.features, batch, self._attention))

    def prepare(self, host: HostBatch, fill: Callable[[Tensor], None]) -> Callable[[], Tensor] | None:
        """Puts a batch where its graph reads it; None if no graph fits it.

        A batch fits when every sequence feeds one token and wants its logits. `fill` writes the token ids
        that only the device knows. What is returned replays the graph and gives [sequences, hidden] as
        CudaDecoder.features, valid until the next replay.
        """
        bucket = bucket_for(len(host.runs), tuple(sorted(self._captured)))
        plain = host.one_token_each and len(host.logit_rows) == len(host.runs)
        if bucket is None or not plain or host.tables.shape[1] > self._static.tables.shape[1]:
            return None
        padded = host.padded(bucket, self._padding_block, self._padding_slot)
        batch = self._rows(bucket, padded)
        given = DeviceBatch.of(padded, batch.token_ids.device)
        for target, source in (
            (batch.token_ids, given.token_ids),
            (batch.positions, given.positions),
            (batch.slots, given.slots),
            (batch.lengths, given.lengths),
            (batch.tables[:, : given.tables.shape[1]], given.tables),
        ):
            target.copy_(source, non_blocking=True)
        fill(batch.token_ids)
        self._attention.plan(batch)
        return partial(self._replay, bucket, len(host.runs))

    def _replay(self, bucket: int, sequences: int) -> Tensor:
        replay, features = self._captured[bucket]
        replay()
        return features[:sequences]

    def _rows(self, rows: int, host: HostBatch) -> DeviceBatch:
        """Views of the first rows of the static tensors, which hold or will hold `host`."""
        static = self._static
        return DeviceBatch(
            static.token_ids[:rows],
            static.positions[:rows],
            static.slots[:rows],
            static.tables[:rows],
            static.lengths[:rows],
            static.logit_rows[:rows],
            host,
        )
