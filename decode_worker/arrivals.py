"""Pure: the legs of a decode worker until they join the batch: the queue, reservations, pulls, early fetches.

A leg may be fetched early, while its prompt is still read: its samples have no tokens then, and it joins only
when it was started and its KV is here. Until it is started it waits behind every leg that is, and gives way
when those that run need its blocks.
"""

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from decode_worker.decode_leg import (
    LEG_TRANSITIONS,
    DecodeLeg,
    LegInput,
    LegRecord,
    LegState,
    Reservation,
)
from decode_worker.room import RoomRules
from engine.kv.blocks import BlockPool
from engine.leg_bounds import RETRY_AFTER_S, check_queue
from engine.transitions import next_state
from tandem.errors import Overloaded, ProtocolError
from tandem.ids import BlockId, LegId


@dataclass(frozen=True, slots=True)
class LostPrefetch:
    """A leg whose early fetch is over; when it was `pulling`, cancel the pull, then call failed."""

    leg_id: LegId
    message: str
    pulling: bool


class Arrivals:
    """Owns the legs that are not in the batch yet, and the blocks that are reserved for them."""

    def __init__(self, pool: BlockPool, room: RoomRules, *, max_waiting: int) -> None:
        """The limits are those of DecodeScheduler."""
        self._pool = pool
        self._room = room
        self._max_waiting = max_waiting
        self._legs: dict[LegId, LegRecord] = {}
        self._waiting: list[LegRecord] = []
        self._reserved: list[LegRecord] = []
        self._lost: list[LostPrefetch] = []
        self._landed: dict[BlockId, int] = {}
        self._arrived = 0

    def __len__(self) -> int:
        return len(self._legs)

    def __iter__(self) -> Iterator[LegRecord]:
        return iter(tuple(self._legs.values()))

    def get(self, leg_id: LegId) -> LegRecord | None:
        """A leg that has not joined."""
        return self._legs.get(leg_id)

    def add(self, leg: DecodeLeg, now_s: float, started: bool) -> None:
        """Queues a leg. Raises Overloaded if the queue is full, ProtocolError if the leg is here."""
        known = self._legs.get(leg.leg_id)
        if known is not None and known.state is LegState.ABORTING:
            raise Overloaded(f"a former pull of leg {leg.leg_id} has not ended", RETRY_AFTER_S)
        if known is not None:
            raise ProtocolError(f"leg {leg.leg_id} is here already")
        check_queue(len(self._waiting), self._max_waiting)
        self._arrived += 1
        record = LegRecord(leg, self._arrived, now_s, leg.samples, started)
        self._legs[leg.leg_id] = record
        insort(self._waiting, record, key=_turn)

    def start(self, leg: DecodeLeg) -> LegRecord | None:
        """A leg that is fetched early may go on; returns it when its KV is here, so that it joins now.

        Raises ProtocolError when it is not fetched early.
        """
        record = self._legs.get(leg.leg_id)
        if record is None or record.started:
            raise ProtocolError(f"leg {leg.leg_id} was not fetched early")
        before = record.state
        record.state = next_state(LEG_TRANSITIONS, before, LegInput.START)
        if before is LegState.WAITING:
            self._waiting.remove(record)
        record.leg, record.starts, record.started = leg, leg.samples, True
        if before is LegState.WAITING:
            insort(self._waiting, record, key=_turn)
        return self._leave(record) if record.state is LegState.RUNNING else None

    def reserve(self, now_s: float, running: int) -> tuple[Reservation, ...]:
        """Takes blocks for waiting legs, in order, beside a batch of `running` samples."""
        reservations: list[Reservation] = []
        while self._waiting:
            record = self._waiting[0]
            reservation = self._take_blocks(record, now_s, running)
            if reservation is None:
                break
            self._waiting.pop(0)
            self._reserved.append(record)
            record.state = next_state(LEG_TRANSITIONS, record.state, LegInput.RESERVE)
            reservations.append(reservation)
        return tuple(reservations)

    def exchanged(self, leg_id: LegId, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Blocks that are reserved for a leg, each with another worker's that came in its stead."""
        self._pool.exchange(pairs)
        record, came = self._legs[leg_id], dict(pairs)
        record.table = tuple(map(came.get, record.table, record.table))

    def landed(self, leg_id: LegId) -> LegRecord | None:
        """The KV is here, verified; returns the leg if it joins now. An unknown leg is ignored."""
        record = self._legs.get(leg_id)
        if record is None:
            return None
        early = not record.started and record.state is LegState.PULLING
        record.state = next_state(
            LEG_TRANSITIONS, record.state, LegInput.LAND_EARLY if early else LegInput.LAND
        )
        self._pool.publish(record.leg.token_ids, record.table)
        self._note_landed(record)
        if record.state is LegState.ENDED:
            self._end(record)
        return self._leave(record) if record.state is LegState.RUNNING else None

    def failed(self, leg_id: LegId) -> None:
        """The pull ended without success and writes nothing any more. An unknown leg is ignored."""
        record = self._legs.get(leg_id)
        if record is not None:
            record.state = next_state(LEG_TRANSITIONS, record.state, LegInput.FAIL)
            self._end(record)

    def cancel(self, record: LegRecord, sample_indices: Sequence[int]) -> bool:
        """Stops a leg, or some samples of it; True means that a pull is in flight that nobody wants."""
        if sample_indices:
            record.starts = tuple(s for s in record.starts if s.sample_index not in sample_indices)
            if record.starts:
                return False
        return self._stop(record)

    def lose(self, record: LegRecord, message: str) -> None:
        """Gives an early fetch up; take_lost tells of it."""
        self._lost.append(LostPrefetch(record.leg.leg_id, message, self._stop(record)))

    def give_way(self) -> bool:
        """Gives up the last early fetch that holds blocks; False when there is none."""
        early = [r for r in self._reserved if not r.started and r.state is not LegState.ABORTING]
        if early:
            self.lose(max(early, key=lambda record: record.rank), "those that run needed its blocks")
        return bool(early)

    def take_lost(self) -> tuple[LostPrefetch, ...]:
        """The early fetches that were given up since the last call."""
        lost, self._lost = tuple(self._lost), []
        return lost

    def take_landed(self) -> tuple[tuple[BlockId, int], ...]:
        """Blocks whose KV landed since the last call, and the tokens in each."""
        landed, self._landed = tuple(self._landed.items()), {}
        return landed

    @property
    def pulling(self) -> bool:
        """Whether blocks are reserved, so that more may become free without anybody giving way."""
        return bool(self._reserved)

    @property
    def aborting(self) -> bool:
        """Whether blocks come back soon: those of pulls that were given up and have not ended."""
        return any(record.state is LegState.ABORTING for record in self._reserved)

    def tables(self) -> list[Sequence[BlockId]]:
        """The reserved blocks, by leg."""
        return [record.table for record in self._reserved]

    def _take_blocks(self, record: LegRecord, now_s: float, running: int) -> Reservation | None:
        """Blocks for all of the leg's shared tokens, or None if there is no room for it yet."""
        ahead = running + sum(len(other.starts) for other in self._reserved)
        token_ids = record.leg.token_ids
        cached = self._pool.match(token_ids, whole=True)
        count = self._pool.blocks_for(len(token_ids)) - len(cached)
        needed = self._room.blocks_needed(count, len(record.starts), ahead)
        if needed is None or needed > self._pool.free_blocks:
            self._pool.release(cached)
            return None
        fresh = self._pool.allocate(count)
        record.table, record.cached_blocks = (*cached, *fresh), len(cached)
        return Reservation(record.leg.leg_id, fresh, len(cached), now_s - record.arrived_s)

    def _note_landed(self, record: LegRecord) -> None:
        size, tokens = self._pool.block_size, len(record.leg.token_ids)
        for index in range(record.cached_blocks, len(record.table)):
            self._landed[record.table[index]] = min(size, tokens - index * size)

    def _stop(self, record: LegRecord) -> bool:
        before = record.state
        record.state = next_state(LEG_TRANSITIONS, before, LegInput.STOP)
        if record.state is LegState.ENDED:
            self._end(record)
        return record.state is LegState.ABORTING

    def _leave(self, record: LegRecord) -> LegRecord:
        """The leg joins the batch, with its blocks."""
        self._reserved.remove(record)
        del self._legs[record.leg.leg_id]
        return record

    def _end(self, record: LegRecord) -> None:
        (self._reserved if record.table else self._waiting).remove(record)
        self._pool.release(record.table)
        del self._legs[record.leg.leg_id]


def _turn(record: LegRecord) -> tuple[bool, tuple[int, int]]:
    """The order of the queue: what was started first, then by rank."""
    return not record.started, record.rank
