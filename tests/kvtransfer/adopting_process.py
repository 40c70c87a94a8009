"""Edge: the giving side of exchanges in a process of its own, so that tests can kill it.

`adopting_process DESCRIPTOR BLOCKS BLOCK_BYTES MARK DIE_AFTER` serves a connected socket. Its blocks begin
with MARK and their number. It kills itself before it answers the kind DIE_AFTER, once that was carried out.
"""

import os
import signal
import socket
import sys

from kvtransfer.shm.adoption import AdoptablePool
from kvtransfer.shm.adoption_link import AdoptionLink, Kind, serve_one
from tandem.errors import TransferError
from tandem.ids import BlockId


def fill(pool: AdoptablePool, mark: int) -> None:
    """Each block holds `mark` and its number, at its first and last bytes."""
    for block in range(pool.num_blocks):
        view = pool.view(BlockId(block))
        view[:2] = view[-2:] = bytes((mark, block))


class DyingLink(AdoptionLink):
    """Dies instead of sending one kind of answer."""

    dies_at: Kind | None = None

    def send(self, kind: Kind, *rest: object) -> None:
        """As the base does, unless it is time to die."""
        if kind is self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        super().send(kind, *rest)  # type: ignore[arg-type]


def main() -> None:
    """Serves until the link ends, then reports its blocks as pairs of numbers on stdout."""
    signal.alarm(60)
    descriptor, blocks, block_bytes, mark, dies_at = sys.argv[1:]
    with AdoptablePool(int(blocks), int(block_bytes)) as pool:
        fill(pool, int(mark))
        link = DyingLink(socket.socket(fileno=int(descriptor)), pool, 30.0)
        link.dies_at = Kind[dies_at] if dies_at != "-" else None
        try:
            while True:
                serve_one(link, pool)
        except TransferError:
            held = [bytes(pool.view(BlockId(block))[:2]).hex() for block in range(pool.num_blocks)]
            print(" ".join(held), flush=True)


if __name__ == "__main__":
    main()
