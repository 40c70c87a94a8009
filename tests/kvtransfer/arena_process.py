"""Edge: a member of an arena in a process of its own, so that tests can kill it.

`arena_process PATH BLOCKS BLOCK_BYTES MARK` joins, marks its blocks, prints its number and its blocks, and
does what standard input says, a line at a time: `give TAKER GIVEN... TAKEN...` (prints how many), `half TAKER
GIVEN... TAKEN...` (takes them, and dies before it gives), `offer GIVER TAKEN...`, `owned`, and its end.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np

from kvtransfer.shm.arena import Arena
from kvtransfer.shm.frame_words import leaving, offered, owned, swap
from tandem.ids import BlockId


def mark(arena: Arena, block_bytes: int, number: int) -> None:
    """Each of the arena's first blocks holds `number` in its first and its last byte."""
    for block in arena.blocks:
        begin = block * block_bytes
        arena.bytes[begin] = arena.bytes[begin + block_bytes - 1] = number


def obey(arena: Arena, words: list[str]) -> str:
    """One line of standard input; what to print."""
    told, *numbers = words
    if told == "owned":
        return " ".join(map(str, arena.owned()))
    other, *frames = (BlockId(int(number)) for number in numbers)
    given, taken = frames[: len(frames) // 2], frames[len(frames) // 2 :]
    if told == "offer":
        arena.offer(other, frames)
        return "offered"
    if told == "half":
        table = arena._file.words
        swap(table, np.array(given), owned(arena.member), leaving(arena.member, other))
        swap(table, np.array(taken), offered(other, arena.member), owned(arena.member))
        os.kill(os.getpid(), signal.SIGKILL)
    return str(len(arena.give(other, given, taken)))


def main() -> None:
    """Until standard input ends."""
    signal.alarm(60)
    path, blocks, block_bytes, number = sys.argv[1:]
    with Arena(Path(path), int(blocks), int(block_bytes)) as arena:
        mark(arena, int(block_bytes), int(number))
        print(arena.member, *arena.blocks, flush=True)
        for line in sys.stdin:
            print(obey(arena, line.split()), flush=True)


if __name__ == "__main__":
    main()
