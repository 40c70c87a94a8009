"""Edge: what recent tokens attended to, and the drop of what they attended to least (MorphKV)."""

import torch
from torch import Tensor

from engine.kv_policies.bounded_kv import KvBudget, KvDrop, KvDrops
from engine.kv_policies.paged_rows import PagedRows
from engine.native.kernels.pages import POOL_FIELDS, keep_rows
from engine.native.team import Team


class RecentAttention:
    """Scores of the slots of watched sequences, by key; the torch thread's alone."""

    def __init__(self, rows: PagedRows, team: Team, budget: KvBudget, largest: bool) -> None:
        """`largest`: a slot's score is the most that one recent token attended to it, not their sum."""
        self._rows = rows
        self._keep = team.kernel(keep_rows, POOL_FIELDS + 4)
        self._window = budget.window
        self.largest = largest
        self._scores: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Sequences that are watched."""
        return len(self._scores)

    def scores(self, key: int, slots: int) -> Tensor:
        """The sequence's scores, float32 [layers, kv_heads, room for `slots` or more]; zeros at first."""
        layers, size, kv_heads = self._rows.shape[:3]
        known = self._scores.get(key)
        if known is not None and known.shape[2] >= slots:
            return known
        room = -(-(slots + self._window) // size) * size
        scores = torch.zeros((layers, kv_heads, room), dtype=torch.float32)
        if known is not None:
            scores[:, :, : known.shape[2]] = known
        self._scores[key] = scores
        return scores

    def begin_step(self, drops: KvDrops) -> None:
        """Drops KV and forgets sequences. Raises KeyError for a drop of one that was not watched."""
        for drop in drops.drops:
            self._carry_out(drop, self._scores.pop(drop.key))
        for key in drops.ended:
            self._scores.pop(key, None)

    def _carry_out(self, drop: KvDrop, scores: Tensor) -> None:
        kept = kept_slots(scores[:, :, : drop.held], drop.keep, self._window)
        tables = torch.tensor(drop.source), torch.tensor(drop.target)
        self._keep(
            *self._rows.pool_arguments,
            drop.keep,
            kept.data_ptr(),
            *(table.data_ptr() for table in tables),
        )


def kept_slots(scores: Tensor, keep: int, window: int) -> Tensor:
    """The slots that stay, int64 [layers, kv_heads, keep], ascending; of equal scores the earlier stays.

    Of `scores` [layers, kv_heads, held] the last `window` slots stay, and of the others those that score
    highest (MorphKV, section 3).
    """
    held = scores.shape[2]
    ranked = scores[:, :, : held - window].sort(dim=2, descending=True, stable=True).indices
    distant = ranked[:, :, : keep - window].sort(dim=2).values
    recent = torch.arange(held - window, held).expand(*scores.shape[:2], window)
    return torch.cat((distant, recent), dim=2)
