"""Pure: what the router believes of one worker's load: its last snapshot, corrected by what was sent since.

A snapshot is up to half a second old and also counts what other routers sent; the router's own books are
exact but know only its own legs. The larger of the two is taken.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from router.worker_key import WorkerKey
from tandem.ids import LegId
from tandem.worker import Role


@dataclass(frozen=True, slots=True)
class ReportedLoad:
    """What dispatch uses of a LoadSnapshot."""

    waiting_prefill_tokens: int = 0
    waiting_legs: int = 0
    running_sequences: int = 0
    total_blocks: int = 0
    free_blocks: int = 0
    draining: bool = False
    stalled_s: float = 0.0


class WorkerView(NamedTuple):
    """A worker as a dispatch policy sees it; all numbers are the router's best estimate.

    A tuple, since one is made for every leg that is sent or ends.
    """

    key: WorkerKey
    prefill_tokens: int
    """Tokens it was given and has not computed."""
    batch: int
    """Sequences that it decodes or is about to."""
    waiting_legs: int
    """Legs of this router whose KV has not landed there."""
    free_blocks: int
    total_blocks: int


@dataclass(slots=True)
class WorkerLoad:
    """The books on one attached worker."""

    key: WorkerKey
    role: Role
    total_blocks: int
    reported: ReportedLoad = ReportedLoad()
    heard_s: float | None = None
    _prefilling: dict[LegId, int] = field(default_factory=dict)
    _fetching: dict[LegId, tuple[int, int]] = field(default_factory=dict)
    _prefetching: dict[LegId, tuple[int, int]] = field(default_factory=dict)
    _decoding: dict[LegId, int] = field(default_factory=dict)
    _prefill_tokens: int = 0
    _prefill_tokens_since: int = 0
    _expected_blocks: int = 0
    _own_batch: int = 0
    """Sequences of this router's legs that it fetches, early ones too, or decodes."""
    _view: WorkerView | None = None
    """The estimate, until something changes."""

    def heard(self, reported: ReportedLoad, now_s: float) -> None:
        """A snapshot came."""
        self.reported = reported
        self.heard_s = now_s
        self._prefill_tokens_since = 0
        self._view = None

    def prefill_sent(self, leg_id: LegId, tokens: int) -> None:
        """A prompt of so many tokens was sent there."""
        self._prefilling[leg_id] = tokens
        self._prefill_tokens += tokens
        self._prefill_tokens_since += tokens
        self._view = None

    def decode_sent(self, leg_id: LegId, blocks: int, sequences: int) -> None:
        """A leg was sent there that will need so many blocks."""
        self._fetching[leg_id] = (blocks, sequences)
        self._expect(blocks, sequences)

    def prefetch_sent(self, leg_id: LegId, blocks: int, sequences: int) -> None:
        """A leg is fetched there while it is read; it will need so many blocks."""
        self._prefetching[leg_id] = (blocks, sequences)
        self._expect(blocks, sequences)

    def prefetch_started(self, leg_id: LegId) -> None:
        """A leg that was fetched early goes on there."""
        needs = self._prefetching.pop(leg_id, None)
        if needs is not None:
            self._fetching[leg_id] = needs
            self._view = None

    def landed(self, leg_id: LegId) -> None:
        """The leg's KV is there; its blocks are counted by the worker from now on."""
        fetched = self._fetching.pop(leg_id, None)
        if fetched is not None:
            self._decoding[leg_id] = fetched[1]
            self._expected_blocks -= fetched[0]
            self._view = None

    def forget(self, leg_id: LegId) -> None:
        """The leg is not at this worker any more; idempotent."""
        if leg_id in self._prefilling:
            self._prefill_tokens -= self._prefilling.pop(leg_id)
            self._view = None
        if leg_id in self._fetching:
            self._leave_expected(*self._fetching.pop(leg_id))
        if leg_id in self._prefetching:
            self._leave_expected(*self._prefetching.pop(leg_id))
        if leg_id in self._decoding:
            self._own_batch -= self._decoding.pop(leg_id)
            self._view = None

    @property
    def prefilling_legs(self) -> int:
        """Legs of this router that it reads now."""
        return len(self._prefilling)

    @property
    def prefilling_tokens(self) -> int:
        """Tokens of this router's legs that it was given and has not offered."""
        return self._prefill_tokens

    @property
    def fetching_legs(self) -> int:
        """Legs of this router whose KV has not landed there."""
        return len(self._fetching)

    @property
    def prefetching_legs(self) -> int:
        """Legs of this router that are fetched there while they are read."""
        return len(self._prefetching)

    def view(self) -> WorkerView:
        """The estimate now."""
        if self._view is None:
            self._view = self._estimate()
        return self._view

    def _expect(self, blocks: int, sequences: int) -> None:
        self._expected_blocks += blocks
        self._own_batch += sequences
        self._view = None

    def _leave_expected(self, blocks: int, sequences: int) -> None:
        self._expect(-blocks, -sequences)

    def _estimate(self) -> WorkerView:
        reported = self.reported
        total = reported.total_blocks or self.total_blocks
        free = reported.free_blocks if reported.total_blocks else total
        return WorkerView(
            self.key,
            max(self._prefill_tokens, reported.waiting_prefill_tokens + self._prefill_tokens_since),
            max(self._own_batch, reported.running_sequences + reported.waiting_legs),
            len(self._fetching),
            free - self._expected_blocks,
            total,
        )
