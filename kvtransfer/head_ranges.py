"""Pure: which bytes of which source rank go where, when source and sink split the KV heads differently.

A rank's block is [layers, 2, block_size, heads of the rank, head_dim]. With at least as many heads as ranks,
each rank holds an equal share of them; with fewer, each head is on several ranks (grouped-query attention).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kvtransfer.contract import HeadRange
from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What a block holds besides heads; `item_bytes` is the size of a number."""

    layers: int
    block_size: int
    head_dim: int
    item_bytes: int

    @property
    def rows(self) -> int:
        """Places at which all heads of a rank lie side by side: layer, K or V, token."""
        return self.layers * 2 * self.block_size

    @property
    def head_bytes(self) -> int:
        """Bytes of one head in one row."""
        return self.head_dim * self.item_bytes


@dataclass(frozen=True, slots=True)
class StridedCopy:
    """Bytes of one source rank's block: `rows` runs of `run_bytes`, evenly spaced on both sides."""

    source_rank: int
    source_offset: int
    source_stride: int
    sink_offset: int
    sink_stride: int
    run_bytes: int
    rows: int

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(offset in the source's block, offset in the sink's block, length), in bytes."""
        for row in range(self.rows):
            source = self.source_offset + row * self.source_stride
            yield source, self.sink_offset + row * self.sink_stride, self.run_bytes


def heads_of(tp: int, rank: int, kv_heads: int) -> HeadRange:
    """The heads of one of `tp` ranks. Raises ConfigError when they cannot be shared out evenly."""
    if tp < 1 or kv_heads < 1 or not 0 <= rank < tp:
        raise ConfigError(f"There is no rank {rank} of {tp} with {kv_heads} KV heads.")
    if kv_heads % tp and tp % kv_heads:
        raise ConfigError(f"{kv_heads} KV heads cannot be shared out to {tp} ranks evenly.")
    return HeadRange(rank * kv_heads // tp, max(1, kv_heads // tp), kv_heads)


def copies_for(
    source_tp: int, sink_tp: int, sink_rank: int, kv_heads: int, shape: BlockShape
) -> tuple[StridedCopy, ...]:
    """What fills a block of one sink rank: every byte of it exactly once.

    Of source ranks that hold the same head, sinks take different ones as far as there are. Raises ConfigError
    as `heads_of` does.
    """
    sink = heads_of(sink_tp, sink_rank, kv_heads)
    copies: list[StridedCopy] = []
    head = sink.first
    while head < sink.first + sink.count:
        rank = _source_rank(source_tp, sink_tp, sink_rank, head, kv_heads)
        source = heads_of(source_tp, rank, kv_heads)
        count = min(source.first + source.count, sink.first + sink.count) - head
        copies.append(_copy(rank, source, sink, head, count, shape))
        head += count
    return tuple(copies)


def _source_rank(source_tp: int, sink_tp: int, sink_rank: int, head: int, kv_heads: int) -> int:
    """A source rank that holds a head."""
    heads_of(source_tp, 0, kv_heads)
    replicas = max(1, source_tp // kv_heads)
    first = head * source_tp // kv_heads
    return first + sink_rank * source_tp // sink_tp % replicas


def _copy(
    rank: int, source: HeadRange, sink: HeadRange, head: int, count: int, shape: BlockShape
) -> StridedCopy:
    run = count * shape.head_bytes
    whole = source.count == sink.count == count
    return StridedCopy(
        source_rank=rank,
        source_offset=(head - source.first) * shape.head_bytes,
        source_stride=source.count * shape.head_bytes,
        sink_offset=(head - sink.first) * shape.head_bytes,
        sink_stride=sink.count * shape.head_bytes,
        run_bytes=run * shape.rows if whole else run,
        rows=1 if whole else shape.rows,
    )
