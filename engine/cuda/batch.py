"""Edge: what one forward pass reads on the device: tokens, positions, slots, block tables and lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.cuda.kernels.paged_prefill import QueryRun
from engine.step import SequenceSlice
from tandem.errors import ProtocolError

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class HostBatch:
    """A flat batch in host memory.

    token_ids, positions and slots are int64 [tokens]: `slots` is each token's row of layer 0's K among the
    pool's token rows. tables int32 [sequences, blocks], padded with 0; lengths int32 [sequences], the new
    tokens included. logit_rows int64 holds the rows whose next token is wanted.
    """

    token_ids: Numbers
    positions: Numbers
    slots: Numbers
    tables: Numbers
    lengths: Numbers
    logit_rows: Numbers
    runs: tuple[QueryRun, ...]

    @property
    def one_token_each(self) -> bool:
        """Whether every sequence feeds a single token."""
        return len(self.token_ids) == len(self.runs)

    def padded(self, rows: int, block: int, slot: int) -> "HostBatch":
        """One token a sequence, with more such sequences: token 0 at position 0, in a spare block."""
        more = rows - len(self.runs)
        first = len(self.runs)
        return HostBatch(
            np.pad(self.token_ids, (0, more)),
            np.pad(self.positions, (0, more)),
            np.pad(self.slots, (0, more), constant_values=slot),
            np.pad(self.tables, ((0, more), (0, 0)), constant_values=block),
            np.pad(self.lengths, (0, more), constant_values=1),
            np.arange(rows),
            self.runs + tuple(QueryRun(row, row, 0, 1) for row in range(first, rows)),
        )


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """The tensors of a HostBatch on the device, beside what they were made from."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    tables: Tensor
    lengths: Tensor
    logit_rows: Tensor
    host: HostBatch

    @classmethod
    def of(cls, host: HostBatch, device: torch.device) -> "DeviceBatch":
        """Copies that do not wait for the device: the host side is pinned where the device is a GPU."""

        def sent(array: Numbers) -> Tensor:
            tensor = torch.from_numpy(array)
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        return cls(
            sent(host.token_ids),
            sent(host.positions),
            sent(host.slots),
            sent(host.tables),
            sent(host.lengths),
            sent(host.logit_rows),
            host,
        )


def host_batch(slices: Sequence[SequenceSlice], layers: int, block_size: int) -> HostBatch:
    """Lays slices out one after the other.

    Raises ProtocolError for a slice without tokens, IndexError for a block table that is too short.
    """
    counts = [len(part.token_ids) for part in slices]
    if not all(counts):
        raise ProtocolError("A step plan holds a slice without tokens.")
    starts = np.array([part.start for part in slices], dtype=np.int64)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    for part, count in zip(slices, counts, strict=True):
        if len(part.block_table) * block_size < part.start + count:
            raise IndexError(f"A block table of {len(part.block_table)} blocks is too short for its slice.")
    width = max(len(part.block_table) for part in slices)
    tables = np.zeros((len(slices), width), dtype=np.int32)
    for row, part in enumerate(slices):
        tables[row, : len(part.block_table)] = part.block_table
    sequence_of = np.repeat(np.arange(len(slices)), counts)
    positions = np.arange(firsts[-1]) - firsts[sequence_of] + starts[sequence_of]
    blocks = tables[sequence_of, positions // block_size].astype(np.int64)
    return HostBatch(
        token_ids=np.fromiter((t for part in slices for t in part.token_ids), np.int64, int(firsts[-1])),
        positions=positions,
        slots=blocks * (layers * 2 * block_size) + positions % block_size,
        tables=tables,
        lengths=(starts + counts).astype(np.int32),
        logit_rows=np.array(
            [firsts[i + 1] - 1 for i, part in enumerate(slices) if part.samples], dtype=np.int64
        ),
        runs=tuple(
            QueryRun(row, int(firsts[row]), part.start, counts[row]) for row, part in enumerate(slices)
        ),
    )
