"""Edge: an arena: one memory in which every worker of a host has its KV blocks, so that these change owners.

Every member maps all of it and owns some of its frames, as many as its pool has blocks; a block's number is
its frame's. An exchange changes words, not pages: no copy, no system call, no fault. Whoever dies, a frame
has one living owner at most, and the next one who joins takes over what the dead have left. See
docs/decisions/004-adopting-pages.md.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import structlog

from kvtransfer.contract import BlockMemory
from kvtransfer.shm.arena_file import ArenaFile, ArenaShape
from kvtransfer.shm.frame_words import (
    MEMBER_BITS,
    NOBODY,
    Words,
    give,
    leaving,
    offered,
    other_of,
    owned,
    owner_of,
    settle,
    swap,
)
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId
from tandem.worker_config import WorkerConfig

MOST_POOLS: Final = 16
"""How many pools as large as its first member's fit into an arena; what is not used takes no memory."""

JOIN_S: Final = 10.0
"""Longest wait for others that join or leave."""

LEAVE_S: Final = 1.0
"""As long at the end; who cannot leave in order is treated as one that was killed."""

_log = structlog.get_logger("tandem.kvtransfer")


class Arena:
    """One member of an arena; `blocks` are the frames that it began with.

    Satisfies what engine.kv.kv_cache asks of memory for a pool. Called from one thread at a time, `populate`
    from any.
    """

    def __init__(self, path: Path, pool_blocks: int, block_bytes: int) -> None:
        """Joins, making the arena if it is not there. Raises TransferError (UNSUPPORTED), one sentence."""
        if pool_blocks < 1 or block_bytes < 1:
            message = f"A pool of {pool_blocks} blocks of {block_bytes} bytes is not possible."
            raise TransferError(TransferFault.UNSUPPORTED, message)
        self._file = ArenaFile(path, ArenaShape(MOST_POOLS * pool_blocks, block_bytes), JOIN_S)
        self.member = 0
        try:
            self.blocks = self._join(pool_blocks)
        except (OSError, TransferError) as error:
            self.close()
            message = f"{path} has no room for {pool_blocks} blocks: {error}"
            raise TransferError(TransferFault.UNSUPPORTED, message) from error

    @property
    def name(self) -> str:
        """The arena's, for ever: two members with the same name share memory."""
        return self._file.name

    @property
    def num_blocks(self) -> int:
        """Frames of the whole arena: what a block's number is less than."""
        return self._file.shape.frames

    @property
    def bytes(self) -> memoryview:
        """Writable bytes of all frames; block i is at i * block_bytes."""
        return self._file.bytes[: self.num_blocks * self._file.shape.block_bytes]

    @property
    def descriptor(self) -> int:
        """Of the file, valid until `close`."""
        return self._file.descriptor

    def owned(self) -> tuple[BlockId, ...]:
        """The frames that are this member's now, those in an exchange among them."""
        mine = np.flatnonzero(owner_of_each(self._file.words) == self.member)
        return tuple(BlockId(int(frame)) for frame in mine)

    def offer(self, giver: int, taken: Sequence[BlockId]) -> None:
        """The giver may have these frames of ours, each for one of its own; `settle` ends that.

        Raises TransferError (REFUSED), nothing being on offer then, unless all are ours.
        """
        frames = self._frames(taken)
        word = offered(self.member, giver)
        done = swap(self._file.words, frames, owned(self.member), word)
        if not done.all():
            swap(self._file.words, frames[done], word, owned(self.member))
            raise TransferError(TransferFault.REFUSED, "A frame is in an exchange already, or not ours.")

    def settle(
        self, giver: int, given: Sequence[BlockId], taken: Sequence[BlockId]
    ) -> tuple[tuple[BlockId, BlockId], ...]:
        """Ends an offer, at once and whatever the giver does: (taken, given) of what it took.

        Of each other pair we keep our frame. To be called once for an offer.
        """
        done = settle(self._file.words, giver, self.member, self._frames(given), self._frames(taken))
        return _pairs(taken, given, done)

    def give(
        self, taker: int, given: Sequence[BlockId], taken: Sequence[BlockId]
    ) -> tuple[tuple[BlockId, BlockId], ...]:
        """Takes what a taker has on offer, and gives it ours: (given, taken) of what was exchanged.

        Less than all only if the taker takes its offer back meanwhile. Nothing of ours may be touched by us
        any more. Raises TransferError (LENGTH) for frames that there are not.
        """
        done = give(self._file.words, self.member, taker, self._frames(given), self._frames(taken))
        return _pairs(given, taken, done)

    def populate(self) -> None:
        """Fills this process's page table for all frames that have owners; for a thread."""
        try:
            self._file.populate(runs_of(np.flatnonzero(self._file.words != NOBODY)))
        except OSError as error:
            _log.info("pages are mapped when they are first touched", error=str(error))

    def close(self) -> None:
        """Leaves: our frames are nobody's and their memory is free; no block may be used any more."""
        if self._file.descriptor < 0:
            return
        try:
            if self.member:
                self._leave()
            else:
                self._file.end_joining()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _join(self, count: int) -> tuple[BlockId, ...]:
        """The file holds the joining lock, which ends here."""
        member = self._file.next_member()
        if member >> MEMBER_BITS or not self._file.lock_member(member):
            raise TransferError(TransferFault.UNSUPPORTED, "It has had too many members.")
        left = self._take_from_the_dead()
        free = np.flatnonzero(self._file.words == NOBODY)
        if len(free) < count:
            raise TransferError(TransferFault.UNSUPPORTED, f"Only {len(free)} are free.")
        chosen = free[:count]
        self._file.give_back(runs_of(np.setdiff1d(left, chosen)))
        self.member = member
        swap(self._file.words, chosen, NOBODY, owned(member))
        self._file.end_joining()
        self._file.allocate(runs_of(chosen))
        return tuple(BlockId(int(frame)) for frame in chosen)

    def _take_from_the_dead(self) -> Words:
        """Frames whose owners are dead are nobody's now; which. Who died in the middle of giving owes one."""
        words = self._file.words
        left = []
        for word in np.unique(words[words != NOBODY]).tolist():
            owes = word == leaving(owner_of(word), other_of(word)) and self._file.lives(other_of(word))
            if not self._file.lives(owner_of(word)) and not owes:
                left.append(word)
        return _forsaken(words, left)

    def _leave(self) -> None:
        member, self.member = self.member, 0
        try:
            with self._file.joining(LEAVE_S):
                words = self._file.words
                mine = np.unique(words[owner_of_each(words) == member]).tolist()
                # A frame that a giver takes meanwhile is the giver's, with its content.
                self._file.give_back(runs_of(np.sort(_forsaken(words, mine))))
                if not self._file.others_live():
                    self._file.remove()
        except OSError as error:
            # As if we had been killed: the next one to join takes what we leave.
            _log.warning("the KV arena was not left in order", error=str(error))
        finally:
            self._file.unlock_member(member)

    def _frames(self, blocks: Sequence[BlockId]) -> Words:
        frames = np.asarray(blocks, dtype=np.int64)
        if len(frames) and not 0 <= frames.min() <= frames.max() < self.num_blocks:
            raise TransferError(TransferFault.LENGTH, "A frame lies outside of the arena.")
        return frames


def _forsaken(words: Words, left: Sequence[int]) -> Words:
    """The frames that had these words, one word's after the other; they are nobody's now."""
    frames = [np.flatnonzero(words == word) for word in left]
    done = [some[swap(words, some, word, NOBODY)] for word, some in zip(left, frames, strict=True)]
    return np.concatenate(done) if done else np.empty(0, dtype=np.int64)


def _pairs(
    left: Sequence[BlockId], came: Sequence[BlockId], done: npt.NDArray[np.bool_]
) -> tuple[tuple[BlockId, BlockId], ...]:
    """(block that left, block that came) where that was done."""
    return tuple(itertools.compress(zip(left, came, strict=True), done.tolist()))


def pool_memory(config: WorkerConfig) -> Callable[[int, int], Arena | None] | None:
    """What opens memory for a worker's pool of (blocks, bytes of a block); None: memory of its own.

    What it opens is the arena that the settings name; where that cannot be had, a warning says why, and the
    pool has memory of its own: its KV is copied.
    """
    path = config.kv_arena
    if path is None:
        return None

    def opened(pool_blocks: int, block_bytes: int) -> Arena | None:
        try:
            arena = Arena(path, pool_blocks, block_bytes)
        except TransferError as error:
            _log.warning("the KV pool lies in no arena, so its blocks are copied", reason=str(error))
            return None
        _log.info("the KV pool lies in an arena", arena=arena.name, member=arena.member, blocks=pool_blocks)
        return arena

    return opened


def arena_of(memory: BlockMemory) -> Arena | None:
    """The arena that a pool lies in."""
    held = getattr(memory, "memory", None)
    return held if isinstance(held, Arena) else None


def owner_of_each(words: Words) -> Words:
    """Who owns each frame, as `owner_of`; int64 [frames]."""
    return words & ((1 << MEMBER_BITS) - 1)


def runs_of(frames: Words) -> list[tuple[int, int]]:
    """(first, count) of frames, in order, that follow each other."""
    if len(frames) == 0:
        return []
    bounds = [0, *(np.flatnonzero(np.diff(frames) != 1) + 1).tolist(), len(frames)]
    return [(int(frames[low]), high - low) for low, high in itertools.pairwise(bounds)]
