"""Pure: what the router believes of one worker's load: its last snapshot, corrected by what was sent since.

A snapshot is up to half a second old and also counts what other routers sent; the router's own books are
exact but know only its own legs. The larger of the two is taken.
"""

from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as a dispatch policy sees it; all numbers are the router's best estimate."""

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

    def heard(self, reported: ReportedLoad, now_s: float) -> None:
        """A snapshot came."""
        self.reported = reported
        self.heard_s = now_s
        self._prefill_tokens_since = 0

    def prefill_sent(self, leg_id: LegId, tokens: int) -> None:
        """A prompt of so many tokens was sent there."""
        self._prefilling[leg_id] = tokens
        self._prefill_tokens += tokens
        self._prefill_tokens_since += tokens

    def decode_sent(self, leg_id: LegId, blocks: int, sequences: int) -> None:
        """A leg was sent there that will need so many blocks."""
        self._fetching[leg_id] = (blocks, sequences)

    def prefetch_sent(self, leg_id: LegId, blocks: int, sequences: int) -> None:
        """A leg is fetched there while it is read; it will need so many blocks."""
        self._prefetching[leg_id] = (blocks, sequences)

    def prefetch_started(self, leg_id: LegId) -> None:
        """A leg that was fetched early goes on there."""
        needs = self._prefetching.pop(leg_id, None)
        if needs is not None:
            self._fetching[leg_id] = needs

    def landed(self, leg_id: LegId) -> None:
        """The leg's KV is there; its blocks are counted by the worker from now on."""
        fetched = self._fetching.pop(leg_id, None)
        if fetched is not None:
            self._decoding[leg_id] = fetched[1]

    def forget(self, leg_id: LegId) -> None:
        """The leg is not at this worker any more; idempotent."""
        self._prefill_tokens -= self._prefilling.pop(leg_id, 0)
        self._fetching.pop(leg_id, None)
        self._prefetching.pop(leg_id, None)
        self._decoding.pop(leg_id, None)

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
        reported = self.reported
        expected = [*self._fetching.values(), *self._prefetching.values()]
        fetching_blocks = sum(blocks for blocks, _ in expected)
        fetching_sequences = sum(sequences for _, sequences in expected)
        total = reported.total_blocks or self.total_blocks
        free = reported.free_blocks if reported.total_blocks else total
        own_batch = fetching_sequences + sum(self._decoding.values())
        return WorkerView(
            key=self.key,
            prefill_tokens=max(
                self._prefill_tokens, reported.waiting_prefill_tokens + self._prefill_tokens_since
            ),
            batch=max(own_batch, reported.running_sequences + reported.waiting_legs),
            waiting_legs=len(self._fetching),
            free_blocks=free - fetching_blocks,
            total_blocks=total,
        )
