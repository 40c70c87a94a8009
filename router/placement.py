"""Pure: which waiting leg goes to which worker next: the queues, the books on workers, and the policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.kv.block_hash import chain_hashes
from router.admission import WaitingQueue
from router.dispatch import POLICIES, DecodeNeed, PrefillNeed, without_avoided
from router.prefix_index import PrefixIndex
from router.readiness import takes_legs
from router.worker_key import WorkerKey
from router.worker_load import WorkerLoad, WorkerView
from tandem.errors import ConfigError
from tandem.ids import BlockHash, LegId
from tandem.worker import Role


@dataclass(frozen=True, slots=True)
class WaitingLeg:
    """A leg that needs a worker; `anew` marks one whose request has been started before."""

    leg_id: LegId
    token_ids: Sequence[int]
    sequences: int
    avoid: frozenset[WorkerKey]
    priority: int
    deadline_s: float
    since_s: float
    anew: bool


@dataclass(frozen=True, slots=True)
class Windows:
    """How much may be outstanding at one worker; a lone leg is always let through."""

    prefill_tokens: int
    decode_legs: int

    def let_read(self, load: WorkerLoad, tokens: int) -> bool:
        """Whether a prompt of so many tokens may be sent there."""
        return not load.prefilling_legs or load.prefilling_tokens + tokens <= self.prefill_tokens

    def let_fetch(self, load: WorkerLoad) -> bool:
        """Whether a leg that is read may be sent there."""
        return load.fetching_legs < max(1, self.decode_legs)

    def let_fetch_early(self, load: WorkerLoad) -> bool:
        """Whether a leg that is still being read may be sent there."""
        return load.fetching_legs + load.prefetching_legs < max(1, self.decode_legs)


def decode_blocks(tokens: int, sequences: int, block_size: int) -> int:
    """Blocks that a leg needs to begin decoding."""
    return tokens // block_size + sequences


class Placement:
    """Owns the order of the waiting legs and the estimate of each worker's load.

    Raises ConfigError for an unknown policy. Legs that are placed anew go before new ones: their readers wait
    in the middle of a stream.
    """

    def __init__(self, policy: str, block_size: int, windows: Windows) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"dispatch must be one of {', '.join(sorted(POLICIES))}, not {policy!r}.")
        self.index = PrefixIndex()
        self._policy = POLICIES[policy](self.index, block_size)
        self._block_size = block_size
        self._windows = windows
        self._loads: dict[WorkerKey, WorkerLoad] = {}
        self._in_order: list[WorkerLoad] = []
        self._waiting: dict[LegId, WaitingLeg] = {}
        self._prefill_new: WaitingQueue[LegId] = WaitingQueue()
        self._prefill_anew: WaitingQueue[LegId] = WaitingQueue()
        self._decode: WaitingQueue[LegId] = WaitingQueue()
        self._hashes: dict[LegId, Sequence[BlockHash]] = {}

    @property
    def loads(self) -> Mapping[WorkerKey, WorkerLoad]:
        """The books on the attached workers."""
        return self._loads

    def attach(self, load: WorkerLoad) -> None:
        """A worker can be chosen from now on."""
        self._loads[load.key] = load
        self._in_order = [self._loads[key] for key in sorted(self._loads)]

    def detach(self, key: WorkerKey) -> None:
        """A worker is lost; idempotent."""
        self._loads.pop(key, None)
        self._in_order = [self._loads[known] for known in sorted(self._loads)]
        self.index.forget(key)

    def wait_for_prefill(self, leg: WaitingLeg) -> None:
        """The leg needs a prefill worker."""
        self._waiting[leg.leg_id] = leg
        queue = self._prefill_anew if leg.anew else self._prefill_new
        queue.push(leg.leg_id, leg.priority, leg.deadline_s)

    def wait_for_decode(self, leg: WaitingLeg) -> None:
        """The leg's KV is offered and it needs a decode worker."""
        self._waiting[leg.leg_id] = leg
        self._decode.push(leg.leg_id, leg.priority, leg.deadline_s)

    def offered(self, leg_id: LegId, key: WorkerKey) -> None:
        """The prefill worker is done with computing the leg."""
        if key in self._loads:
            self._loads[key].forget(leg_id)

    def place_prefetch(self, leg: WaitingLeg) -> WorkerKey | None:
        """The decode worker that fetches a leg while it is read; None when none has room to spare for it.

        Legs that are read go first, and what runs must be able to grow: nobody waits for an early fetch.
        """
        blocks = self._decode_blocks(leg)
        views = [
            view
            for load in self._serving(Role.DECODE)
            if self._windows.let_fetch_early(load)
            and (view := load.view()).free_blocks >= blocks + view.batch
        ]
        if not views or len(self._decode):
            return None
        key = self._choose_decode(leg, blocks, views)
        self._loads[key].prefetch_sent(leg.leg_id, blocks, leg.sequences)
        return key

    def start_prefetched(self, leg_id: LegId, key: WorkerKey) -> None:
        """The leg goes on at the worker that fetches it early."""
        self._hashes.pop(leg_id, None)
        if key in self._loads:
            self._loads[key].prefetch_started(leg_id)

    def prefetch_lost(self, leg_id: LegId, key: WorkerKey) -> None:
        """The worker does not fetch the leg early any more."""
        if key in self._loads:
            self._loads[key].forget(leg_id)

    def landed(self, leg_id: LegId, key: WorkerKey) -> None:
        """The leg's KV is at the decode worker."""
        if key in self._loads:
            self._loads[key].landed(leg_id)

    def forget(self, leg_id: LegId) -> None:
        """The leg is over; idempotent."""
        self._leave_queues(leg_id)
        self._hashes.pop(leg_id, None)
        for load in self._loads.values():
            load.forget(leg_id)

    def next_prefill(self, may_start_new: bool) -> tuple[LegId, WorkerKey] | None:
        """Takes the next leg out of its queue: the leg and the worker to read it; None when it must wait."""
        queue = self._prefill_anew if len(self._prefill_anew) else self._prefill_new
        if queue is self._prefill_new and not may_start_new:
            return None
        leg_id = queue.first()
        if leg_id is None:
            return None
        leg = self._waiting[leg_id]
        tokens = len(leg.token_ids)
        views = [load.view() for load in self._serving(Role.PREFILL) if self._windows.let_read(load, tokens)]
        if not views:
            return None
        views = list(without_avoided(views, leg.avoid))
        key = views[0].key
        if len(views) > 1:
            key = self._policy.prefill(PrefillNeed(tokens, self._hashes_of(leg)), views)
        self._leave_queues(leg_id)
        self._loads[key].prefill_sent(leg_id, tokens)
        return leg_id, key

    def next_decode(self) -> tuple[LegId, WorkerKey] | None:
        """Takes the next offered leg out of its queue: the leg and the worker to fetch it, or None."""
        leg_id = self._decode.first()
        if leg_id is None:
            return None
        leg = self._waiting[leg_id]
        views = [load.view() for load in self._serving(Role.DECODE) if self._windows.let_fetch(load)]
        if not views:
            return None
        blocks = self._decode_blocks(leg)
        key = self._choose_decode(leg, blocks, views)
        self._leave_queues(leg_id)
        self._hashes.pop(leg_id, None)
        self._loads[key].decode_sent(leg_id, blocks, leg.sequences)
        return leg_id, key

    def serves(self, role: Role) -> bool:
        """Whether an attached worker plays that role and takes legs."""
        return any(takes_legs(load, role) for load in self._loads.values())

    def waiting_for(self, role: Role) -> tuple[WaitingLeg, ...]:
        """Legs that wait for a worker of that role."""
        queues = (self._decode,) if role is Role.DECODE else (self._prefill_new, self._prefill_anew)
        return tuple([self._waiting[leg_id] for queue in queues for leg_id in queue.items()])

    def _decode_blocks(self, leg: WaitingLeg) -> int:
        return decode_blocks(len(leg.token_ids), leg.sequences, self._block_size)

    def _choose_decode(self, leg: WaitingLeg, blocks: int, views: Sequence[WorkerView]) -> WorkerKey:
        views = without_avoided(views, leg.avoid)
        if len(views) == 1:
            return views[0].key
        return self._policy.decode(DecodeNeed(blocks, leg.sequences, self._hashes_of(leg)), views)

    def _leave_queues(self, leg_id: LegId) -> None:
        if self._waiting.pop(leg_id, None) is not None:
            for queue in (self._prefill_new, self._prefill_anew, self._decode):
                queue.remove(leg_id)

    def _serving(self, role: Role) -> Sequence[WorkerLoad]:
        return [load for load in self._in_order if takes_legs(load, role)]

    def _hashes_of(self, leg: WaitingLeg) -> Sequence[BlockHash]:
        if not self._policy.wants_hashes:
            return ()
        known = self._hashes.get(leg.leg_id)
        if known is None:
            known = self._hashes[leg.leg_id] = chain_hashes(leg.token_ids, self._block_size)
        return known
