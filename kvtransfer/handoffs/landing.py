"""Edge: what has landed of one piece at the sink, and its checksum; fed by the transport's threads."""

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial

from kvtransfer.checksums import XXH3, piece_checksum
from kvtransfer.contract import PullGrant
from kvtransfer.hashing import Hasher, Sums
from kvtransfer.threads import run_to_end
from tandem.ids import BlockId


class Landing:
    """One piece on its way into `targets`; `hasher` hashes each block when it is there, if there is one."""

    def __init__(self, grant: PullGrant, targets: Sequence[BlockId], hasher: Hasher | None) -> None:
        self._grant = grant
        self._targets = targets
        self._hasher = hasher
        self._sums: list[int | None] = [None] * len(targets)
        self._some: Sums | None = None
        # One byte a block: several threads may tell of theirs at once.
        self._here = bytearray(len(targets))

    @property
    def left_bytes(self) -> int:
        """Bytes that have not been heard of."""
        return self._here.count(0) * self._grant.part_bytes

    def landed(self, first: int, count: int, xxh3: Sequence[int] | None = None) -> None:
        """The OnLanded of a transport: called from any thread, once for each block at most."""
        these = slice(first, first + count)
        if xxh3 is not None and self._hasher is not None and self._hasher.name == XXH3:
            self._sums[these] = xxh3
        elif self._hasher is not None:
            if self._some is None:
                # Two threads may both make it; either will do.
                self._some = self._hasher.over(self._targets, self._grant.part_offset, self._grant.part_bytes)
            self._sums[these] = self._some(first, count)
        self._here[these] = b"\x01" * count

    async def checksum(self, executor: Executor) -> int:
        """The piece's checksum, hashing what the transport did not tell of; 0 without a hasher.

        When cancelled it ends soon, and then nothing here reads the targets.
        """
        hasher = self._hasher
        if hasher is None:
            return 0
        stop = threading.Event()
        work = partial(self._finish, hasher, stop)
        missing = self._sums.count(None) * self._grant.part_bytes
        return work() if missing <= hasher.inline_bytes else await run_to_end(executor, work, stop.set)

    def _finish(self, hasher: Hasher, stop: threading.Event) -> int:
        told = [known for known in self._sums if known is not None]
        if len(told) == len(self._sums):
            return piece_checksum(told)
        unknown = [index for index, known in enumerate(self._sums) if known is None]
        blocks = [self._targets[index] for index in unknown]
        sums = hasher.sums(blocks, self._grant.part_offset, self._grant.part_bytes, stop.is_set)
        found = dict(zip(unknown, sums, strict=True))
        return piece_checksum(
            [found[index] if known is None else known for index, known in enumerate(self._sums)]
        )
