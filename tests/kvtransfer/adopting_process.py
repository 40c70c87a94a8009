"""Edge: the taking side of an adopting hand-off in a process of its own, so that tests can kill it.

`adopting_process ADDRESS PATH BLOCKS BLOCK_BYTES` joins the arena at PATH and pulls the leg "a", so many
blocks, from the source at ADDRESS; it prints "offered" when its blocks are on offer.
"""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kvtransfer.contract import BlockRange
from kvtransfer.handoffs.sink import HandoffSink
from kvtransfer.shm.arena import Arena
from tandem.ids import BlockId
from tandem.logs import configure_logging
from tandem.worker import Role
from tests.kvtransfer.arena_pair import ArenaPool
from tests.kvtransfer.pair import TOKEN, config, key, record


class TellingArena(Arena):
    """Prints a line when blocks are on offer."""

    def offer(self, giver: int, taken: Sequence[BlockId]) -> None:
        """As Arena does."""
        super().offer(giver, taken)
        print("offered", flush=True)


async def fetch(address: str, path: Path, count: int, block_bytes: int) -> None:
    """Pulls once."""
    pool = ArenaPool(path, count, block_bytes, TellingArena)
    me, source = record("decode-0", Role.DECODE), record("prefill-0", Role.PREFILL, address)
    sink = HandoffSink(me, pool, config("adopt", "shm"), time.monotonic, TOKEN)
    wanted, targets = BlockRange(0, count), pool.pool.allocate(count)
    await sink.pull(key("a"), source, wanted, targets, 0, 30.0, pool.pool.exchange)


def main() -> None:
    """Never outlives its test by long."""
    signal.alarm(60)
    # Its one line alone goes to stdout.
    configure_logging(logging.WARNING)
    address, path, count, block_bytes = sys.argv[1:]
    asyncio.run(fetch(address, Path(path), int(count), int(block_bytes)))


if __name__ == "__main__":
    main()
