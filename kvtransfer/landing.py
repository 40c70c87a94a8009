"""Edge: what has landed of one piece at the sink, and its checksum; fed by the transport's threads."""

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial

from kvtransfer.checksums import block_checksum, part_of, piece_checksum
from kvtransfer.contract import BlockMemory, PullGrant
from kvtransfer.piece_sums import INLINE_BYTES
from kvtransfer.threads import run_to_end
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId


class Landing:
    """One piece on its way into `targets`; hashes each block when it is there, if `checked`."""

    def __init__(
        self, memory: BlockMemory, grant: PullGrant, targets: Sequence[BlockId], checked: bool
    ) -> None:
        self._memory = memory
        self._grant = grant
        self._targets = targets
        self._checked = checked
        self._sums: list[int | None] = [None] * len(targets)
        # One byte a block: several threads may tell of theirs at once.
        self._here = bytearray(len(targets))

    @property
    def left_bytes(self) -> int:
        """Bytes that have not been heard of."""
        return self._here.count(0) * self._grant.part_bytes

    def landed(self, first: int, count: int) -> None:
        """The OnLanded of a transport: called from any thread, once for each block at most."""
        for index in range(first, first + count):
            if self._checked:
                self._sums[index] = self._sum(index)
            self._here[index] = 1

    async def checksum(self, executor: Executor) -> int:
        """The piece's checksum, hashing what the transport did not tell of; 0 if not `checked`.

        When cancelled it ends soon, and then nothing here reads the targets.
        """
        if not self._checked:
            return 0
        stop = threading.Event()
        work = partial(self._finish, stop)
        missing = self._sums.count(None) * self._grant.part_bytes
        return work() if missing <= INLINE_BYTES else await run_to_end(executor, work, stop.set)

    def _finish(self, stop: threading.Event) -> int:
        sums = []
        for index, known in enumerate(self._sums):
            if stop.is_set():
                raise TransferError(TransferFault.TIMEOUT, "Hashing was stopped.")
            sums.append(self._sum(index) if known is None else known)
        return piece_checksum(sums)

    def _sum(self, index: int) -> int:
        grant = self._grant
        return block_checksum(
            part_of(self._memory, self._targets[index], grant.part_offset, grant.part_bytes)
        )
