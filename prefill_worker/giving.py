"""Pure: whether a leg's blocks may change owners, and its table afterwards."""

from collections.abc import Mapping, Sequence

from engine.kv.blocks import BlockPool
from prefill_worker.prefill_leg import LegRecord
from tandem.ids import BlockId, LegId


class Giving:
    """The scheduler's legs and pool, as far as blocks of them are given away."""

    def __init__(self, pool: BlockPool, legs: Mapping[LegId, LegRecord]) -> None:
        """`legs` are the scheduler's, which goes on to own them."""
        self._pool = pool
        self._legs = legs

    def may_give(self, leg_id: LegId, blocks: Sequence[BlockId]) -> bool:
        """Whether no step touches a leg's blocks and nobody else, nor the prefix cache, has these."""
        record = self._legs.get(leg_id)
        if record is None or record.slice_tokens:
            return False
        return set(record.table).issuperset(blocks) and all(map(self._pool.private, blocks))

    def gave(self, leg_id: LegId, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """(block that left, block that came): the latter are the leg's, until its offer is released."""
        record = self._legs[leg_id]
        self._pool.exchange(pairs)
        came = dict(pairs)
        record.table = tuple(map(came.get, record.table, record.table))
