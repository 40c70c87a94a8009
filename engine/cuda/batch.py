"""Edge: what one forward pass reads on the device: tokens, positions, slots, block tables and lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention import Span
from engine.cuda.kernels.paged_prefill import QueryRun
from engine.drafting.draft import NO_DRAFT, Draft
from engine.step import SequenceSlice
from tandem.errors import ProtocolError

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class HostBatch:
    """A flat batch in host memory.

    token_ids, positions and slots are int64 [tokens]: `slots` is each token's row of layer 0's K among the
    pool's token rows. tables int32 [sequences, blocks], padded with 0; lengths int32 [sequences], the new
    tokens included. logit_rows int64 holds the rows whose next token is wanted, `picks` the place among
    them of each requested token. `runs` and `trees` have an entry for each sequence.
    """

    token_ids: Numbers
    positions: Numbers
    slots: Numbers
    tables: Numbers
    lengths: Numbers
    logit_rows: Numbers
    picks: Numbers
    runs: tuple[QueryRun, ...]
    trees: tuple[Draft, ...]

    @property
    def branches(self) -> bool:
        """Whether guesses on several branches are to be verified."""
        return any(self.trees)

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
            self.picks,
            self.runs + tuple(QueryRun(row, row, 0, 1) for row in range(first, rows)),
            self.trees + (NO_DRAFT,) * more,
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
        """Copies that do not wait for the device."""
        return cls(
            sent(host.token_ids, device),
            sent(host.positions, device),
            sent(host.slots, device),
            sent(host.tables, device),
            sent(host.lengths, device),
            sent(host.logit_rows, device),
            host,
        )


def sent(array: Numbers, device: torch.device) -> Tensor:
    """The array on the device; nobody waits for the copy: the host side is pinned where that is a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def host_batch(slices: Sequence[SequenceSlice], layers: int, block_size: int) -> HostBatch:
    """Lays slices out one after the other.

    Raises ProtocolError for a slice without tokens, IndexError for a block table that is too short.
    """
    spans = _spans(slices, block_size)
    counts = np.array([span.tokens for span in spans])
    sequence_of = np.repeat(np.arange(len(spans)), counts)
    tables = _tables(spans)
    token_ids = np.fromiter((token for part in slices for token in part.token_ids), np.int64, counts.sum())
    slots = np.concatenate([np.arange(span.start, span.start + span.tokens) for span in spans])
    blocks = tables[sequence_of, slots // block_size].astype(np.int64)
    rows = [
        span.first_row + request.row % span.tokens
        for span, part in zip(spans, slices, strict=True)
        for request in part.samples
    ]
    places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
    return HostBatch(
        token_ids=token_ids,
        positions=_positions(spans, slots),
        slots=blocks * (layers * 2 * block_size) + slots % block_size,
        tables=tables,
        lengths=np.array([span.start + span.tokens for span in spans], dtype=np.int32),
        logit_rows=np.array(list(places), dtype=np.int64),
        picks=np.array([places[row] for row in rows], dtype=np.int64),
        runs=tuple(
            QueryRun(sequence, span.first_row, span.start, span.tokens) for sequence, span in enumerate(spans)
        ),
        trees=tuple(span.tree for span in spans),
    )


def _spans(slices: Sequence[SequenceSlice], block_size: int) -> list[Span]:
    spans: list[Span] = []
    row = 0
    for part in slices:
        tokens = len(part.token_ids)
        if not tokens:
            raise ProtocolError("A step plan holds a slice without tokens.")
        if len(part.block_table) * block_size < part.start + tokens:
            raise IndexError(f"A block table of {len(part.block_table)} blocks is too short for its slice.")
        tree = part.draft if part.draft.parents else NO_DRAFT
        spans.append(Span(row, tokens, part.start, part.block_table, tree))
        row += tokens
    return spans


def _tables(spans: Sequence[Span]) -> Numbers:
    tables = np.zeros((len(spans), max(len(span.block_table) for span in spans)), dtype=np.int32)
    for row, span in enumerate(spans):
        tables[row, : len(span.block_table)] = span.block_table
    return tables


def _positions(spans: Sequence[Span], slots: Numbers) -> Numbers:
    """A token stands where its K and V lie in its sequence, but for guesses on branches of a tree."""
    positions = slots.copy()
    for span in spans:
        if span.tree:
            positions[span.first_row : span.first_row + span.tokens] = span.positions()
    return positions
